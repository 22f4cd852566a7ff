"""The ways to combine several teachers, by name."""

from __future__ import annotations

from typing import Any

from hf_transfer_ext.registry import Registry
from hf_transfer_ext.teachers.learned import LearnedTeachers
from hf_transfer_ext.teachers.several import ConfidentTeachers, MixedTeachers, RoutedTeachers

_COMBINATIONS: list[Any] = [MixedTeachers, ConfidentTeachers, RoutedTeachers, LearnedTeachers]
COMBINED_TEACHERS = Registry("combination of teachers", _COMBINATIONS)
