"""Tensors and oracles for the tests of merge methods: the definitions, as float64 loops over single elements."""

from __future__ import annotations

import itertools
import math

import torch
from safetensors.torch import load_file, save_file

from hf_transfer_ext.merging import MERGE_METHODS

#: Options that make every method do something, for tests that go through all of them.
OPTIONS = {
    "linear": {"weight": [0.5, 0.3, 0.7]},
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": [0.5, 0.3]},
    "multislerp": {"weight": [0.5, 0.3, 0.7]},
    "karcher": {},
    "passthrough": {"scale": 0.5},
    "fisher": {"weight": [0.5, 0.3, 0.7]},
    "regmean": {"weight": [0.5, 0.3, 0.7]},
    "task_arithmetic": {"weight": [0.5, 0.3, 0.7], "lambda_": 0.8},
    "ties": {"weight": [0.5, 0.3, 0.7], "density": [0.5, 0.2, 0.9]},
    "dare_linear": {"weight": [0.5, 0.3, 0.7], "density": 0.4},
    "dare_ties": {"weight": [0.5, 0.3, 0.7], "density": 0.4},
    "breadcrumbs": {"weight": [0.5, 0.3, 0.7], "density": [0.5, 0.2, 0.8], "gamma": 0.1},
    "breadcrumbs_ties": {"weight": [0.5, 0.3, 0.7], "density": 0.5, "gamma": [0.1, 0.2, 0.3]},
    "della": {"weight": [0.5, 0.3, 0.7], "density": 0.4},
    "della_linear": {"weight": [0.5, 0.3, 0.7], "density": 0.4, "epsilon": 0.3},
    "model_stock": {},
    "sce": {"select_topk": 0.3},
    "nearswap": {"t": 0.2},
    "arcee_fusion": {},
    "ram": {"epsilon": 0.3},
    "ramplus_tl": {"epsilon": 0.3, "alpha": 0.9, "r": 0.5},
    "tsv": {},
    "iso_c": {},
    "iso_cts": {},
    "knots": {"weight": [0.5, 0.3, 0.7], "density": 0.5},
    "wudi": {"iterations": 20, "learning_rate": 1e-3},
}


def tensors(count=3, shape=(6, 10), seed=0, spread=0.5):
    """A base and models around it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return base, [base + spread * torch.randn(shape, generator=generator) for _ in range(count)]


def extra_of(method, models, seed=7):
    """Extra tensors of the models as a method declares them, in float32: name -> one for each model."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, extra in method.extra.items():
        if extra.shape == "weight":
            found[name] = [torch.rand(model.shape, generator=generator) + 0.1 for model in models]
        elif models[0].dim() > 1:
            inputs = [torch.randn(2 * model.shape[-1], model.shape[-1], generator=generator) for model in models]
            found[name] = [one.T @ one for one in inputs]
    return found


def write_extra(method, folders):
    """Write extra tensors for the models in some folders: for each the `tensors` of its source in a configuration."""
    named = [load_file(f"{folder}/model.safetensors") for folder in folders]
    files = [{name: f"{folder}/{name}.safetensors" for name in method.extra} for folder in folders]
    for name in method.extra:
        extra = {key: extra_of(method, [one[key].float() for one in named]).get(name) for key in named[0]}
        for i, file in enumerate(files):
            save_file({key: tensors[i] for key, tensors in extra.items() if tensors is not None}, file[name])
    return files


def per_element(function, *tensors):
    """Apply a function of numbers to every element, in float64."""
    shape = tensors[0].shape
    flat = [tensor.double().reshape(-1).tolist() for tensor in tensors]
    return torch.tensor([function(*numbers) for numbers in zip(*flat, strict=True)], dtype=torch.float64).reshape(
        shape
    )


def close(actual, expected, tolerance=2e-6):
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max()
    assert error <= tolerance * max(1.0, float(expected.abs().max())), float(error)


def dot(one, two):
    return math.fsum(
        a * b for a, b in zip(one.double().reshape(-1).tolist(), two.double().reshape(-1).tolist(), strict=True)
    )


def trimmed(change, kept, dropped=0):
    """Keep the `kept` largest elements after the `dropped` largest, by sorting; 0 elsewhere."""
    order = sorted(range(change.numel()), key=lambda i: -abs(float(change.reshape(-1)[i])))
    result = torch.zeros(change.numel(), dtype=torch.float64)
    for i in order[dropped : dropped + kept]:
        result[i] = change.reshape(-1)[i]
    return result.reshape(change.shape)


def elected(base, changes, weights, normalize, strength=1.0):
    """The election of TIES for each element."""

    def merge(start, *numbers):
        weighted = [w * number for w, number in zip(weights, numbers, strict=True)]
        sign = 1.0 if math.fsum(weighted) >= 0 else -1.0
        agree = [(one, w) for one, w in zip(weighted, weights, strict=True) if one * sign > 0]
        total = math.fsum(one for one, _ in agree)
        if normalize and agree:
            total /= math.fsum(w for _, w in agree)
        return start + strength * total

    return per_element(merge, base, *changes)


def pairs(count):
    return list(itertools.combinations(range(count), 2))


def config_of(name, base, tuned):
    """A configuration of the method with its `OPTIONS`, for model folders."""
    method, options = MERGE_METHODS[name], OPTIONS[name]
    count = min(len(tuned), method.count[1] or len(tuned))
    config = {"merge_method": name, "models": [{"model": path, "parameters": {}} for path in tuned[:count]]}
    for model, files in zip(config["models"], write_extra(method, tuned[:count]), strict=True):
        model |= {"tensors": files} if files else {}
    if method.base == "required":
        config["base_model"] = base
    config["parameters"] = {}
    for key, option in method.options.items():
        if option.name not in options:
            continue
        value = options[option.name]
        if option.per_model:
            for i, model in enumerate(config["models"]):
                model["parameters"][key] = value[i] if isinstance(value, list) else value
        else:
            config["parameters"][key] = value
    return config
