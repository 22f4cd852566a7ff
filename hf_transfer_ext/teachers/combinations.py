"""What a teacher can be, and how several are combined, as `DistillationConfig` names them."""

from __future__ import annotations

from typing import Any

from hf_transfer_ext.teachers.cache import CachedTeacher
from hf_transfer_ext.teachers.learned import LearnedTeachers
from hf_transfer_ext.teachers.live import AdapterTeacher, LiveTeacher
from hf_transfer_ext.teachers.server import ServerTeacher
from hf_transfer_ext.teachers.several import ConfidentTeachers, MixedTeachers, RoutedTeachers

#: What an entry of `teachers` names; alone: `teacher_model_name_or_path`, `teacher_adapter`, ...
TEACHER_KINDS: dict[str, Any] = {
    "model": LiveTeacher,
    "adapter": AdapterTeacher,
    "cache": CachedTeacher,
    "server": ServerTeacher,
}
#: The values of `teachers_by`.
COMBINED_TEACHERS: dict[str, Any] = {
    "weight": MixedTeachers,
    "confidence": ConfidentTeachers,
    "column": RoutedTeachers,
    "learned": LearnedTeachers,
}
