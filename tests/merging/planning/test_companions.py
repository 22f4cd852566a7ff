"""What a model needs beside its weights is listed; what it does not need is not."""

from __future__ import annotations

from hf_transfer_ext.merging.planning.companions import companion_files


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_what_a_result_needs(tmp_path):
    needed = [
        "tokenizer.json",
        "tekken.json",
        "qwen.tiktoken",
        "spiece.model",
        "processor_config.json",
        "modules.json",
    ]
    needed += ["1_Pooling/config.json", "additional_chat_templates/tool_use.jinja", "generation_config.json"]
    write(
        tmp_path, *needed, "config.json", "README.md", "trainer_state.json", "notes.txt", "model.safetensors", "x.py"
    )
    assert companion_files(tmp_path, {}) == sorted(needed)


def test_code_goes_with_what_names_it(tmp_path):
    write(tmp_path, "modeling_my.py", "configuration_my.py")
    assert companion_files(tmp_path, {}) == []
    mapped = {"auto_map": {"AutoConfig": "configuration_my.MyConfig"}}
    assert companion_files(tmp_path, mapped) == ["configuration_my.py", "modeling_my.py"]
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_my.My", null]}}')
    assert "modeling_my.py" in companion_files(tmp_path, {})
