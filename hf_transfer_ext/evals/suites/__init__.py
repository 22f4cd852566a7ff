"""Unlearning benchmarks by name: their datasets, their metrics, and what they report."""

from __future__ import annotations

from hf_transfer_ext.evals.suite import Suite, check_suite
from hf_transfer_ext.evals.suites.conceptvectors import conceptvectors
from hf_transfer_ext.evals.suites.muse import muse
from hf_transfer_ext.evals.suites.r_tofu import r_tofu
from hf_transfer_ext.evals.suites.restor import restor
from hf_transfer_ext.evals.suites.rwku import rwku
from hf_transfer_ext.evals.suites.tofu import tofu
from hf_transfer_ext.registry import Registry

SUITES: Registry[Suite] = Registry("suite", [tofu, muse, rwku, r_tofu, restor, conceptvectors], check=check_suite)
