"""Vectors of two sides with few rows, as lists for loops and as tensors."""

import math

import torch


def problem(width=4, teacher_width=4, rows=3, sides=2, seed=0):
    """Student and teacher vectors in float64, and a projection."""
    random = torch.Generator().manual_seed(seed)
    student = torch.randn(sides, rows, width, generator=random, dtype=torch.float64)
    teacher = torch.randn(sides, rows, teacher_width, generator=random, dtype=torch.float64)
    return student, teacher, torch.randn(teacher_width, width, generator=random, dtype=torch.float64)


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def times(matrix, vector):
    return [sum(m * v for m, v in zip(row, vector, strict=True)) for row in matrix]
