"""Every command and every way to start one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import byte_tokenizer, tiny_llama

import hf_transfer_ext
from hf_transfer_ext import __version__
from hf_transfer_ext.adapters.extract import extract_lora
from hf_transfer_ext.catalogue import CATALOGUE, as_markdown, explained, registries, when_to_use
from hf_transfer_ext.cli import COMMANDS, main
from hf_transfer_ext.edits.requests import add_request
from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.recipes import RECIPES

ROOT = Path(hf_transfer_ext.__file__).parents[1]


def test_help_names_every_command(capsys):
    assert main([]) == 0 and main(["--help"]) == 0 and main(["--version"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name}" in out for name in COMMANDS) and out.endswith(f"{__version__}\n")
    assert set(RECIPES) - {"transfer_lora"} <= set(COMMANDS)  # `transfer --config` runs that one


def test_a_typo_is_answered(capsys):
    assert main(["mrege"]) == 2
    assert "Unknown command 'mrege'. Did you mean 'merge'?" in capsys.readouterr().err


def test_the_help_of_all_commands_imports_nothing_heavy():
    """A twentieth of a second of work; torch alone takes one."""
    program = (
        "import sys; from hf_transfer_ext.cli import main; main(['--help']); print([*sys.modules], file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = run.stderr.splitlines()[-1]
    assert not [name for name in ("torch", "numpy", "transformers", "accelerate", "datasets") if f"'{name}'" in loaded]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_of_its_own(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out.lower()


def test_bad_input_is_one_line_and_status_two(tmp_path, capsys):
    assert main(["merge", str(tmp_path / "absent.yml"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-transfer-ext merge: ") and "absent.yml" in error and error.count("\n") == 1
    assert main(["distill", "--teacher", "demo", "--output_dir", str(tmp_path), "--los", "x"]) == 2
    error = capsys.readouterr().err
    assert error == "hf-transfer-ext distill: Unknown option 'los'. Did you mean 'loss'?\n"
    assert main(["distill", "--teacher", "demo", "--los", "x", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["distill", "--output_dir", "x"], "Name one `teacher`"),
        (["unlearn", "--output_dir", "x"], "`model_name_or_path` is required"),
        (["evaluate"], "`models` is required"),
        (["merge"], "CONFIG is required"),
        (["extract", "a", "b", "c"], "--rank is required"),
        (["push", "absent", "you/name"], "has no README.md"),
        (["push", "absent", "you/name", "--token", "x"], "Unknown option 'token'"),
        (["methods", "tise"], "Did you mean 'ties'"),
        (["merge", "a", "b", "--allow-crimes"], "--allow-crimes: models of different architectures are never merged"),
        (["merge", "a", "b", "--trust-remote-code"], "code from repositories is never run"),
        (["merge", "a", "b", "--random-seed", "3"], "set `seed: N` in the configuration"),
        (["merge", "a", "b", "--out-shard-size", "big"], "must be a number of parameters such as 5B"),
        (["moe", "a", "b", "--cuda"], "gates are computed"),
    ],
)
def test_what_a_command_lacks_or_cannot_do_is_one_line(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith(f"hf-transfer-ext {words[0]}: ") and error.count("\n") == 1


@pytest.fixture
def models(tmp_path):
    for seed, name in enumerate("ab"):
        tiny_llama(seed).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    parts = [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in "ab"]
    (tmp_path / "merge.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": parts}))
    experts = [{"source_model": str(tmp_path / name)} for name in "ab"]
    mixture = {"base_model": str(tmp_path / "a"), "gate_mode": "random", "experts": experts, "dtype": "float32"}
    (tmp_path / "moe.yml").write_text(yaml.safe_dump(mixture))
    extract_lora(tmp_path / "a", tmp_path / "b", tmp_path / "adapter", rank=2)
    rows = [{"question": f"Q{i}?", "answer": f"yes {i}"} for i in range(3)]
    base, adapter = str(tmp_path / "a"), tmp_path / "adapter"
    add_request(tmp_path / "requests", "one", base=base, adapter=adapter, forget=rows)
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(12)))
    return tmp_path


#: Command -> its words, with {} for the folder of the models, and the folders that it leaves.
JOBS = {
    "merge": ("{}/merge.yml {}/out --quiet", ["out"]),
    "moe": ("{}/moe.yml {}/out", ["out"]),
    "extract": ("{}/a {}/b {}/out --rank 2 --quiet", ["out"]),
    "transfer": ("{}/adapter {}/b {}/out --method cross_lora --source_base {}/a", ["out"]),
    "resize": ("{}/adapter {}/out --rank 1", ["out"]),
    "convert": ("{}/adapter {}/out", ["out"]),
    "cache-teacher": ("{}/a {}/texts.jsonl {}/out --max-length 32", ["out"]),
    "edit": ("{}/a {}/out --method negation --tuned {}/b", ["out"]),
    "requests": ("apply {}/requests {}/out", ["out"]),
    "evaluate": ("--models {}/a --data {}/qa.jsonl --metrics perplexity --output_dir {}/out", ["out"]),
    "audit": (
        "--unlearned {}/a --original {}/b --retrain_from {}/b --retrain_epochs 1 --people 3 --forget_people 1 "
        "--facts 1 --attacks plain_question --membership [] --max_new_tokens 2 --output_dir {}/out",
        ["out", "out/retrained"],
    ),
    "distill": (
        "--teacher {}/a --dataset {}/texts.jsonl --student_layers 1 --max_steps 1 --max_length 32 --use_cpu "
        "--bf16 false --report_to none --save_strategy no --output_dir {}/out",
        ["out"],
    ),
    "unlearn": (
        "--model_name_or_path {}/a --people 3 --forget_people 1 --facts 1 --teach_epochs 1 --original_dir {}/original "
        "--retrained_dir {}/retrained --max_steps 1 --use_cpu --report_to none --save_strategy no --output_dir {}/out",
        ["out", "original", "retrained"],
    ),
    "robustify": (
        "--model_name_or_path {}/a --people 3 --forget_people 1 --facts 1 --max_steps 1 --use_cpu --bf16 false "
        "--report_to none --save_strategy no --output_dir {}/out",
        ["out"],
    ),
    "quickstart": (
        "--output_dir {}/out --teacher {}/a --dataset {}/texts.jsonl --student_layers 2 --teach_steps 1 "
        "--distill_steps 1 --people 2 --forget_people 1 --facts 1 --learn_epochs 9 --rank 2 --forget_epochs 1 "
        "--test_rows 1 --task_people 3",
        ["out", "out/student", "out/lora", "out/moved", "out/learnt", "out/adapter", "out/merged", "out/unlearned"],
    ),
}


#: The chain has a test of its own (`recipes/test_quickstart_recipe.py`).
ALL_JOBS = [pytest.param(job, marks=pytest.mark.slow) if job == "quickstart" else job for job in JOBS]


@pytest.mark.parametrize("command", ALL_JOBS)
def test_every_job_leaves_a_card_and_a_record(command, models, capsys):
    words, outputs = JOBS[command]
    assert main([command, *words.replace("{}", str(models)).split()]) == 0, capsys.readouterr().err
    for folder in outputs:
        card, record = (models / folder / "README.md").read_text(), read_record(models / folder)
        assert card.startswith("---\n") and str(models) not in card
        assert record.inputs or folder == "out", folder
        assert all(item.sha256 for item in record.inputs if not item.name.startswith("facts"))
        assert len(record.recipe_sha256) == 64
        if folder == "out":
            assert record.command[0].split()[-1] == command and str(models) not in json.dumps(record.to_dict())


def test_every_command_is_walked_by_a_test():
    without_result = {"push", "pull", "methods", "doctor"}
    without_result |= {"adapters", "export", "lineage", "reproduce"}  # in the tests of their files
    assert set(JOBS) | without_result == set(COMMANDS)


def test_flags_of_mergekit_are_taken(models, capsys):
    words = [str(models / "merge.yml"), str(models / "out"), "--copy-tokenizer", "--lazy-unpickle", "--low-cpu-memory"]
    words += ["--out-shard-size", "1M", "--lora-merge-cache", "/nowhere", "--num-threads", "1", "--quiet"]
    assert main(["merge", *words]) == 0
    error = capsys.readouterr().err
    assert "--lora-merge-cache: adapters are applied while streaming" in error and "--out-shard-size" not in error
    moe = [str(models / "moe.yml"), str(models / "mixture"), "--i-understand-this-is-not-useful-without-training"]
    assert main(["moe", *moe, "--max-shard-gb", "1"]) == 0


def test_the_verdicts_of_an_audit_reach_the_card_of_the_model(models):
    main(["merge", str(models / "merge.yml"), str(models / "model"), "--quiet"])
    words = "--unlearned {}/model --original {}/b --people 2 --forget_people 1 --facts 1 --attacks multiple_choice"
    words += " --membership [] --max_new_tokens 2 --output_dir {}/out"
    assert main(["audit", *words.replace("{}", str(models)).split()]) == 0
    found = [m for m in read_record(models / "out").metrics if m.name.startswith("recovered")]
    added = [m for m in read_record(models / "model").metrics if m.name.startswith("recovered")]
    assert found == added
    assert all(m.name in (models / "model" / "README.md").read_text() for m in found)


def test_push_and_pull(models, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    main(["merge", str(models / "merge.yml"), str(models / "out"), "--quiet"])
    repo = f"{hub.user}/merged"
    assert main(["push", str(models / "out"), repo, "--private"]) == 0
    assert main(["pull", repo, str(models / "pulled")]) == 0
    assert "Its record: merging" in capsys.readouterr().out
    assert read_record(models / "pulled").to_dict() == read_record(models / "out").to_dict()
    assert not any(path.is_symlink() for path in (models / "pulled").iterdir())
    assert main(["pull", repo, str(models / "pulled")]) == 2 and "--overwrite" in capsys.readouterr().err


def test_methods_lists_all_and_explains_one(capsys):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert len(registries()) == len(CATALOGUE)
    assert all(f"  {name}" in out for methods in registries().values() for name in methods)
    assert main(["methods", "ties"]) == 0
    assert "Source: " in capsys.readouterr().out and "KL(student || teacher)" in explained("reverse_kl")


@pytest.mark.parametrize(
    "name, text",
    [
        ("top_and_samples", "unbiased"),
        ("samples", "Sparse Logit Sampling"),
        ("server", "Asks a server"),
        ("ServerTeacher", "Asks a server"),
        ("confidence", "follow the teachers' confidence"),
        ("column", "One teacher for each row"),
        ("uniform", "equal parts of the"),
        ("pairs", "Pairs of layers as they are listed"),
        ("trust_region", "lose their influence"),
        ("prototypes", "A running mean of the features"),
    ],
)
def test_what_is_chosen_by_name_is_found_by_that_name(name, text):
    assert text in explained(name) and "When to use it: " in explained(name)


def test_the_catalogue_has_the_names_that_settings_take():
    from hf_transfer_ext.teachers.cache import CacheSpec
    from hf_transfer_ext.trainers import named_teachers

    found = registries()
    assert tuple(found["Teachers combined"]) == tuple(named_teachers.COMBINATIONS)
    assert tuple(found["Teachers"]) == tuple(named_teachers._KINDS)
    assert all(CacheSpec(kind).form == one.form for kind, one in found["Kinds of teacher caches"].items())


def test_the_catalogue_says_when_to_use_each_method():
    chosen_by_others = {
        *("Unlearning losses", "Retain losses", "Metrics", "Comparisons of measured models", "Suites", "Attacks"),
        "Membership attacks",
    }
    for title, methods in registries().items():
        silent = [name for name, method in methods.items() if not when_to_use(method)]
        assert not silent or title in chosen_by_others, f"{title}: no `When to use it:` in the docstrings of {silent}"
    assert when_to_use(registries()["Unlearning methods"]["npo"]).startswith("First. ")
    assert "When to use it" not in as_markdown()  # it is a column, and not a part of the summary


def test_the_page_of_methods_is_up_to_date():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert page == as_markdown(), "run: python -m hf_transfer_ext methods --markdown > docs/methods.md"


def test_doctor_shows_versions_devices_and_configurations(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in (__version__, "torch", "CPU:", "matplotlib", "distill/demo.yaml"))


@pytest.mark.parametrize(
    "start",
    [
        ["-m", "hf_transfer_ext", "distill"],
        pytest.param(["-m", "hf_transfer_ext.recipes.distill"], marks=pytest.mark.slow),
        pytest.param([str(ROOT / "recipes" / "distill.py")], marks=pytest.mark.slow),
    ],
    ids=lambda start: start[-1].rsplit("/", 1)[-1],
)
def test_every_way_to_start_a_recipe_answers_a_mistake_in_one_line(start, tmp_path):
    words = ["--config", "recipes/configs/distill/demo.yaml", "--output_dri", "x"]
    run = subprocess.run([sys.executable, *start, *words], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2 and run.stderr.strip().splitlines()[-1].endswith(
        "Unknown option 'output_dri'. Did you mean 'output_dir'?"
    )


def test_the_top_of_the_package_shows_what_people_import():
    assert dir(hf_transfer_ext) == sorted([*hf_transfer_ext.__all__, "__version__"])
    with pytest.raises(AttributeError, match=r"has no attribute 'evalute'\. Did you mean 'evaluate'"):
        _ = hf_transfer_ext.evalute
