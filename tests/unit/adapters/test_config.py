from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import VBLoRAConfig as PeftConfig

from adapters.config import CONFIG_FILE, MAX_CONFIG_BYTES, MAX_CONFIG_VALUES, MAX_PATTERNS, VBLoRAConfig
from adapters.errors import LONGEST_MESSAGE, AdapterError, BadConfig, MissingTensor, UnsupportedCheckpoint


def parse(**values: Any) -> VBLoRAConfig:
    return VBLoRAConfig.parse(json.dumps({"peft_type": "VBLORA", **values}))


def peft_writes(config: PeftConfig, path: Path) -> dict[str, Any]:
    config.save_pretrained(str(path))
    return json.loads((path / CONFIG_FILE).read_text())


class TestDefaults:
    def test_are_pefts(self, tmp_path: Path):
        written = peft_writes(PeftConfig(), tmp_path)
        ours = VBLoRAConfig().to_dict()
        assert {key: written[key] for key in ours} == ours
        assert parse() == VBLoRAConfig()

    def test_peft_0_13_has_no_exclude_modules(self):
        assert parse(r=2).exclude_modules is None


class TestRoundTrip:
    FIELDS = {  # noqa: RUF012
        "r": 2,
        "num_vectors": 90,
        "vector_length": 16,
        "topk": 3,
        "save_only_topk_weights": True,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["lm_head"],
        "layers_to_transform": [1, 3],
        "layers_pattern": ["layers"],
        "bias": "vblora_only",
        "modules_to_save": ["score"],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "init_vector_bank_bound": 0.05,
        "init_logits_std": 0.2,
        "vblora_dropout": 0.1,
    }

    def test_peft_reads_what_we_write(self, tmp_path: Path):
        ours = parse(**self.FIELDS)
        (tmp_path / CONFIG_FILE).write_text(ours.to_json())
        theirs = PeftConfig.from_pretrained(str(tmp_path))
        for key, value in self.FIELDS.items():
            got = getattr(theirs, key)
            assert (sorted(got) if isinstance(got, set) else got) == value

    def test_nothing_is_lost(self):
        values = {"peft_type": "VBLORA", **self.FIELDS, "runtime_config": {"ephemeral": [1, None]}, "peft_version": "9"}
        written = VBLoRAConfig.from_dict(values).to_dict()
        assert written == values
        assert VBLoRAConfig.parse(json.dumps(written)) == VBLoRAConfig.from_dict(values)
        assert list(written) == sorted(written)

    def test_reads_from_a_directory(self, tmp_path: Path):
        (tmp_path / CONFIG_FILE).write_text(parse(r=7).to_json())
        assert VBLoRAConfig.read(tmp_path).r == 7


class TestForms:
    def test_names_may_be_a_list_a_regex_or_null(self):
        assert parse(target_modules=["q", "v"]).target_modules == ("q", "v")
        assert parse(target_modules=r".*\.q").target_modules == r".*\.q"
        assert parse(target_modules=None).target_modules is None
        assert parse(target_modules="All-Linear").targets_all_linear
        assert not parse(target_modules=["all-linear"]).targets_all_linear

    def test_layers_may_be_one_many_or_none(self):
        assert parse(layers_to_transform=0).layers_to_transform == (0,)
        assert parse(layers_to_transform=[0, 2]).layers_to_transform == (0, 2)
        assert parse(layers_to_transform=None).layers_to_transform is None

    def test_an_empty_list_of_layers_with_a_pattern_is_fine_with_peft_and_us(self):
        PeftConfig(layers_to_transform=[], layers_pattern="h")
        config = parse(layers_to_transform=[], layers_pattern="h")
        assert (config.layers_to_transform, config.layers_pattern) == ((), ("h",))
        assert config.to_dict()["layers_to_transform"] == []

    def test_layers_pattern_may_be_a_string(self):
        assert parse(layers_to_transform=1, layers_pattern="h").layers_pattern == ("h",)
        assert parse(layers_to_transform=1, layers_pattern="").layers_pattern == ()

    def test_null_bias_is_none(self):
        assert parse(bias=None).bias == "none"


REFUSED = {
    "r zero": ({"r": 0}, "r"),
    "r negative": ({"r": -4}, "r"),
    "r a float": ({"r": 4.0}, "r"),
    "r a bool": ({"r": True}, "r"),
    "r a string": ({"r": "4"}, "r"),
    "r null": ({"r": None}, "r"),
    "r beyond reason": ({"r": 2**31}, "r"),
    "num_vectors zero": ({"num_vectors": 0}, "num_vectors"),
    "vector_length zero": ({"vector_length": 0}, "vector_length"),
    "topk zero": ({"topk": 0}, "topk"),
    "topk above num_vectors": ({"topk": 9, "num_vectors": 8}, "topk"),
    "save_only_topk_weights a number": ({"save_only_topk_weights": 1}, "save_only_topk_weights"),
    "target_modules a number": ({"target_modules": 3}, "target_modules"),
    "target_modules with a number": ({"target_modules": ["q", 3]}, "target_modules"),
    "exclude_modules a dict": ({"exclude_modules": {"a": 1}}, "exclude_modules"),
    "modules_to_save a number": ({"modules_to_save": 1}, "modules_to_save"),
    "too many modules_to_save": ({"modules_to_save": ["x"] * (MAX_PATTERNS + 1)}, "modules_to_save"),
    "too many layers_pattern": (
        {"layers_to_transform": 1, "layers_pattern": ["x"] * 101},
        "layers_pattern",
    ),
    "layers_to_transform a string": ({"layers_to_transform": "1"}, "layers_to_transform"),
    "layers_to_transform with a bool": ({"layers_to_transform": [True]}, "layers_to_transform"),
    "layers_pattern alone": ({"layers_pattern": "layers"}, "layers_pattern"),
    "bias unknown": ({"bias": "lora_only"}, "bias"),
    "bias a number": ({"bias": 1}, "bias"),
    "base_model_name_or_path a number": ({"base_model_name_or_path": 1}, "base_model_name_or_path"),
    "base_model_name_or_path of a megabyte": ({"base_model_name_or_path": "x" * 10**6}, "base_model_name_or_path"),
    "bias of a megabyte": ({"bias": "x" * 10**6}, "bias"),
    "r a megabyte": ({"r": "x" * 10**6}, "r"),
    "init_logits_std negative": ({"init_logits_std": -1}, "init_logits_std"),
    "init_logits_std beyond float": ({"init_logits_std": 10**400}, "init_logits_std"),
    "init_vector_bank_bound a string": ({"init_vector_bank_bound": "0.02"}, "init_vector_bank_bound"),
}


@pytest.mark.parametrize(("values", "subject"), REFUSED.values(), ids=REFUSED)
def test_refuses_naming_the_field(values: dict[str, Any], subject: str):
    with pytest.raises(BadConfig) as refusal:
        parse(**values)
    assert refusal.value.subject == subject
    assert refusal.value.code == "bad_config"
    assert subject in refusal.value.message
    assert len(refusal.value.message) <= LONGEST_MESSAGE


NOT_JSON = {
    "empty": b"",
    "cut short": b'{"peft_type": "VBLORA", "r"',
    "not UTF-8": b'{"peft_type": "VBLORA\xff"}',
    "a list": b"[]",
    "null": b"null",
    "a key twice": b'{"peft_type": "VBLORA", "r": 4, "r": 8}',
    "a nested key twice": b'{"peft_type": "VBLORA", "x": {"a": 1, "a": 2}}',
    "NaN": b'{"peft_type": "VBLORA", "vblora_dropout": NaN}',
    "infinity by overflow": b'{"peft_type": "VBLORA", "vblora_dropout": 1e999}',
    "half a surrogate pair": b'{"peft_type": "VBLORA", "task_type": "\\ud800"}',
    "half a surrogate pair in a key": b'{"peft_type": "VBLORA", "\\udc00": 1}',
    "nested without end": b'{"peft_type": "VBLORA", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested too deep for those after us": b'{"peft_type": "VBLORA", "x": ' + b"[" * 100 + b"]" * 100 + b"}",
    "too many values": b'{"peft_type": "VBLORA", "x": [' + b"{}," * MAX_CONFIG_VALUES + b"0]}",
    "a byte order mark": b'\xef\xbb\xbf{"peft_type": "VBLORA"}',
    "UTF-16": '{"peft_type": "VBLORA"}'.encode("utf-16"),
    "a number of 5000 digits": b'{"peft_type": "VBLORA", "r": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("raw", NOT_JSON.values(), ids=NOT_JSON)
def test_refuses_what_is_not_portable_json(raw: bytes):
    """What is taken in is listed again, as JSON in UTF-8: one adapter must not break the list."""
    with pytest.raises(BadConfig) as refusal:
        VBLoRAConfig.parse(raw)
    assert refusal.value.subject == CONFIG_FILE


@pytest.mark.parametrize("peft_type", ["LORA", "vblora", None, 3, ["VBLORA"]])
def test_another_peft_type_is_unsupported(peft_type: object):
    with pytest.raises(UnsupportedCheckpoint, match="VBLORA") as refusal:
        VBLoRAConfig.from_dict({"peft_type": peft_type, "r": "not even looked at"})
    assert refusal.value.subject == "peft_type"


def test_a_missing_file_and_one_too_large(tmp_path: Path):
    with pytest.raises(MissingTensor) as missing:
        VBLoRAConfig.read(tmp_path)
    assert missing.value.subject == CONFIG_FILE
    (tmp_path / CONFIG_FILE).write_bytes(b" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(BadConfig, match="larger"):
        VBLoRAConfig.read(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELD_NAMES = sorted({*VBLoRAConfig().to_dict(), "vblora_dropout"} - {"peft_type"})


@given(st.dictionaries(st.sampled_from(FIELD_NAMES), json_values, max_size=4))
def test_any_json_is_read_or_refused(values: dict[str, Any]):
    raw = json.dumps({**values, "peft_type": "VBLORA"})
    try:
        config = VBLoRAConfig.parse(raw)
    except AdapterError:
        return
    assert VBLoRAConfig.parse(config.to_json()) == config
