"""The command line from end to end: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, OPTConfig, PretrainedConfig, PreTrainedModel

from adapters.checkpoint import LogitsCheckpoint, TopKCheckpoint, read_checkpoint
from adapters.config import VBLoRAConfig
from adapters.export import write_adapter
from adapters.targets import LayerShape
from service import __version__
from service.cli import main
from service.settings import Settings
from tests.factories import rewrite, tiny_model
from tests.fixtures import Fixture, recorded_fixtures
from tests.lora_factory import make_lora
from tests.unit.service.command_line import run, run_json

pytestmark = pytest.mark.usefixtures("no_variables", "restored_logging")

SMALL = ("--num-vectors", "32", "--vector-length", "16")


class TestCommandLine:
    def test_it_starts_without_torch(self) -> None:
        check = "import service.cli, sys; assert not {'torch', 'transformers', 'uvicorn'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", check], check=True)

    @pytest.mark.parametrize("words", [["--help"], ["serve", "--help"], ["init", "--help"]])
    def test_help(self, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
        code, out, err = run(capsys, *words)
        assert (code, err) == (0, "")
        assert out.startswith("usage: vblora-serve")

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(capsys, "--version") == (0, f"vblora-serve {__version__}\n", "")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["serv"], "there is no command 'serv': did you mean serve?; see vblora-serve --help"),
            (["xyz"], "there is no command 'xyz'; see vblora-serve --help"),
            (["serve"], "no base model is given; set --model or VBLORA_MODEL"),
            (
                ["serve", "--prot", "1"],
                "--prot is not understood here: did you mean --port?; see vblora-serve serve",
            ),
            (["serve", "--model", "m", "--port", "x"], "--port is 'x'; expected a whole number"),
            (["serve", "--model", "m", "--config", "/none.toml"], "/none.toml cannot be read"),
            (["inspect"], "the following arguments are required: DIR; see vblora-serve inspect --help"),
            (["init", "--model", "m"], "give --output DIR to write the adapter, or --dry-run"),
            (["export", "d", "--format", "gguf", "--output", "o"], "invalid choice: 'gguf'"),
        ],
    )
    def test_usage_errors(self, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
        code, out, err = run(capsys, *words)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1

    def test_variables_and_flags_reach_the_server(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken: list[Settings] = []
        monkeypatch.setattr("service.commands.serve.run", lambda settings: taken.append(settings) or 0)
        monkeypatch.setenv("VBLORA_MODEL", "org/name")
        words = ["serve", "--port", "9", "--adapter", "a=/x", "--adapter", "b=/y", "--no-metrics-public"]
        assert run(capsys, *words)[0] == 0
        (settings,) = taken
        assert (settings.model, settings.port, settings.metrics_public) == ("org/name", 9, False)
        assert [adapter.name for adapter in settings.adapter] == ["a", "b"]

    def test_a_bug_is_one_line_unless_debugged(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*args: object, **kwargs: object) -> int:
            raise ZeroDivisionError("two\nlines\x1b[2J")

        monkeypatch.setattr("service.commands.inspect.run", broken)
        code, _, err = run(capsys, "inspect", ".")
        assert (code, err.count("\n")) == (1, 1)
        assert "ZeroDivisionError: two lines" in err
        assert "\x1b" not in err
        monkeypatch.setenv("VBLORA_DEBUG", "1")
        with pytest.raises(ZeroDivisionError):
            main(["inspect", "."])


class TestInspect:
    @pytest.mark.parametrize("fixture", recorded_fixtures(), ids=lambda fixture: fixture.name)
    def test_adapters_that_peft_wrote(self, capsys: pytest.CaptureFixture[str], fixture: Fixture) -> None:
        found = run_json(capsys, "inspect", fixture.adapter, "--model", fixture.base)
        assert found["config"]["peft_type"] == "VBLORA"
        assert found["layers"]
        assert found["warnings"]

    def test_people_are_told(self, capsys: pytest.CaptureFixture[str], compact: Path, base: Path) -> None:
        code, out, err = run(capsys, "inspect", compact, "--model", base)
        assert code == 0
        assert f"4 layers, all of them in {base}" in out
        assert "  model.layers.*.self_attn.q_proj  64→64  × 2\n" in out
        assert "resumable       no" in out
        assert "\nVB-LoRA params to-be-saved (float32-equivalent): " in out
        assert "warning: the config names no base model" in err
        assert "\x1b" not in out + err

    def test_resumable(self, capsys: pytest.CaptureFixture[str], compact: Path, full: Path) -> None:
        assert run_json(capsys, "inspect", compact)["resumable"] is False
        assert run_json(capsys, "inspect", full)["resumable"] is True

    def test_refused(self, capsys: pytest.CaptureFixture[str], compact: Path, tmp_path: Path) -> None:
        bank = "base_model.vblora_vector_bank"
        broken = rewrite(compact, tmp_path / "nan", tensors=lambda tensors: tensors[bank].fill_(float("nan")))
        code, out, err = run(capsys, "inspect", broken)
        assert (code, out) == (1, "")
        assert err.startswith("refused (non_finite): base_model.vblora_vector_bank contains NaN")

    def test_refused_as_json(self, capsys: pytest.CaptureFixture[str], compact: Path, tmp_path: Path) -> None:
        other = rewrite(compact, tmp_path / "other", config={"peft_type": "LOHA"})
        code, out, _ = run(capsys, "inspect", other, "--json")
        assert code == 1
        assert json.loads(out)["error"]["code"] == "unsupported_checkpoint"

    def test_refused_by_the_base(self, capsys: pytest.CaptureFixture[str], compact: Path) -> None:
        other = next(fixture.base for fixture in recorded_fixtures() if fixture.base.name == "gpt2")
        code, _, err = run(capsys, "inspect", compact, "--model", other)
        assert code == 1
        assert err.startswith("refused (no_target_matched): ")

    def test_another_base_by_name(
        self, capsys: pytest.CaptureFixture[str], compact: Path, base: Path, tmp_path: Path
    ) -> None:
        foreign = rewrite(compact, tmp_path / "foreign", config={"base_model_name_or_path": "org/other"})
        code, _, err = run(capsys, "inspect", foreign, "--model", base)
        assert code == 1
        assert err.startswith("refused (base_model_mismatch): ")

    def test_a_stranger_does_not_drive_the_terminal(
        self, capsys: pytest.CaptureFixture[str], compact: Path, tmp_path: Path
    ) -> None:
        hostile = rewrite(compact, tmp_path / "hostile", config={"base_model_name_or_path": "\x1b[2Jorg/x\nforged"})
        _, out, err = run(capsys, "inspect", hostile)
        assert "\x1b" not in out + err
        assert "\nforged" not in out

    def test_no_directory(self, capsys: pytest.CaptureFixture[str], compact: Path) -> None:
        code, _, err = run(capsys, "inspect", "/none")
        assert (code, err) == (1, "error: /none is not a directory; give one that holds an adapter_config.json\n")
        assert "there is no directory /none" in run(capsys, "inspect", compact, "--model", "/none")[2]


class TestWorkedExamples:
    """The counts of the format's description: through `inspect` on a checkpoint, and through `init` from a config."""

    def test_four_attention_projections_of_4096(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        names = [f"model.layers.{i}.self_attn.{side}_proj" for i in range(32) for side in "qkvo"]
        path = self._compact([LayerShape(name, 4096, 4096) for name in names], tmp_path / "adapter")
        found = run_json(capsys, "inspect", path)["parameters"]
        assert (found["full_logits_params"], found["vblora_params"]) == (998_400, 39_936)
        assert found["lora_params"] == 4_194_304
        assert run(capsys, "inspect", path)[1].endswith(
            "VB-LoRA params to-be-saved (float32-equivalent): 39,936 || total params to-be-saved: 39,936\n"
        )

    def test_opt_125m(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        names = [f"model.decoder.layers.{i}.self_attn.{side}_proj" for i in range(12) for side in "qv"]
        path = self._compact([LayerShape(name, 768, 768) for name in names], tmp_path / "adapter")
        found = run_json(capsys, "inspect", path)["parameters"]
        assert (found["full_logits_params"], found["vblora_params"]) == (49_920, 16_224)

    def test_from_the_config_of_a_large_model(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        config = LlamaConfig(
            hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, vocab_size=128
        )
        found = self._planned(capsys, config, "q_proj,k_proj,v_proj,o_proj", tmp_path)
        assert found["parameters"]["vblora_params"] == 998_400
        assert found["compact_parameters"]["vblora_params"] == 39_936
        assert found["parameters"]["lora_params"] == 4_194_304
        assert found["output"] is None

    def test_from_the_config_of_opt_125m(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        found = self._planned(capsys, OPTConfig(), "q_proj,v_proj", tmp_path)
        assert found["parameters"]["vblora_params"] == 49_920
        assert found["compact_parameters"]["vblora_params"] == 16_224

    @staticmethod
    def _compact(layers: list[LayerShape], path: Path) -> Path:
        config = VBLoRAConfig(r=4, num_vectors=60, vector_length=256, topk=2, target_modules="all-linear")
        write_adapter(LogitsCheckpoint.initialise(config, layers).to_topk(), path)
        return path

    @staticmethod
    def _planned(capsys: pytest.CaptureFixture[str], config: PretrainedConfig, targets: str, tmp_path: Path) -> Any:
        config.save_pretrained(tmp_path / "base")
        words = ("--r", 4, "--num-vectors", 60, "--vector-length", 256, "--topk", 2, "--target-modules", targets)
        return run_json(capsys, "init", "--model", tmp_path / "base", *words, "--dry-run")


class TestInit:
    @pytest.mark.parametrize("targets", [None, "q_proj,o_proj", r".*\.1\..*(up|down)_proj", "all-linear"])
    def test_peft_trains_it(
        self, capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path, targets: str | None
    ) -> None:
        words = [] if targets is None else ["--target-modules", targets]
        planned = run_json(capsys, "init", "--model", base, *SMALL, "--output", tmp_path / "a", *words)
        adapter = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "a"), is_trainable=True)
        assert adapter.get_nb_savable_parameters() == (planned["parameters"]["vblora_params"], 0)
        trained = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
        before = {name: parameter.detach().clone() for name, parameter in trained.items()}
        ids = torch.arange(8).unsqueeze(0)
        adapter(input_ids=ids, labels=ids).loss.backward()
        torch.optim.SGD(trained.values(), lr=1.0).step()
        assert len(trained) == 1 + 2 * len(planned["layers"])
        assert not any(torch.equal(before[name], parameter) for name, parameter in trained.items())

    def test_names_may_have_spaces_beside_the_commas(self, capsys: pytest.CaptureFixture[str], base: Path) -> None:
        words = ("init", "--model", base, *SMALL, "--dry-run", "--target-modules", " q_proj, v_proj ")
        assert run_json(capsys, *words)["config"]["target_modules"] == ["q_proj", "v_proj"]

    def test_what_it_writes_is_served(self, capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path) -> None:
        assert run(capsys, "init", "--model", base, *SMALL, "--output", tmp_path / "a")[0] == 0
        found = run_json(capsys, "inspect", tmp_path / "a", "--model", base)
        assert found["resumable"] is True
        assert found["config"]["target_modules"] == ["q_proj", "v_proj"]
        assert found["config"]["base_model_name_or_path"] is None

    def test_the_base_is_named_by_its_hub_id_alone(
        self, capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path
    ) -> None:
        cached = tmp_path / "models--org--tiny" / "snapshots" / "abc123"
        cached.mkdir(parents=True)
        shutil.copy(base / "config.json", cached)
        words = ("init", *SMALL, "--dry-run")
        assert run_json(capsys, *words, "--model", cached)["config"]["base_model_name_or_path"] == "org/tiny"
        named = run_json(capsys, *words, "--model", base, "--base-name", "org/mine")
        assert named["config"]["base_model_name_or_path"] == "org/mine"
        assert str(base) not in json.dumps(named)

    def test_a_seed_decides_the_values(self, capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path) -> None:
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            run(capsys, "init", "--model", base, *SMALL, "--seed", seed, "--output", tmp_path / name)
        a, b, c = (read_checkpoint(tmp_path / name).bank.vectors for name in "abc")
        assert torch.equal(a, b)
        assert not torch.equal(a, c)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--vector-length", "48"], "vector_length 48 does not divide the in_features 64"),
            ([*SMALL, "--topk", "33"], "topk is 33 but num_vectors is 32"),
            ([*SMALL, "--r", "0"], "r is 0; it must be a positive whole number"),
            ([*SMALL, "--target-modules", "c_attn"], "no module of the base model (llama) matches 'c_attn'"),
            ([*SMALL, "--target-modules", "("], "is not a valid regular expression"),
        ],
    )
    def test_refused(
        self, capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path, words: list[str], message: str
    ) -> None:
        code, _, err = run(capsys, "init", "--model", base, "--output", tmp_path / "a", *words)
        assert code == 1
        assert message in err
        assert not (tmp_path / "a").exists()

    def test_it_overwrites_nothing(self, capsys: pytest.CaptureFixture[str], base: Path, compact: Path) -> None:
        code, _, err = run(capsys, "init", "--model", base, *SMALL, "--output", compact)
        assert code == 1
        assert "is not an empty directory; choose another path" in err


class TestExport:
    def test_full_to_compact_is_what_peft_writes(
        self, capsys: pytest.CaptureFixture[str], full: Path, compact: Path, tmp_path: Path
    ) -> None:
        code, out, _ = run(capsys, "export", full, "--format", "topk", "--output", tmp_path / "out")
        assert code == 0
        assert "total params to-be-saved" in out
        ours, pefts = read_checkpoint(tmp_path / "out"), read_checkpoint(compact)
        assert isinstance(ours, TopKCheckpoint)
        assert isinstance(pefts, TopKCheckpoint)
        assert torch.equal(ours.indices, pefts.indices)
        torch.testing.assert_close(ours.weights, pefts.weights)

    def test_compact_to_full_says_that_it_cannot_be_trained(
        self, capsys: pytest.CaptureFixture[str], compact: Path, tmp_path: Path
    ) -> None:
        _, out, _ = run(capsys, "export", compact, "--format", "logits", "--output", tmp_path / "out")
        assert "resumable: false" in out
        found = run_json(capsys, "inspect", tmp_path / "out")
        assert (found["parameters"]["storage"], found["resumable"]) == ("logits", False)

    def test_it_overwrites_nothing(self, capsys: pytest.CaptureFixture[str], full: Path, compact: Path) -> None:
        code, _, err = run(capsys, "export", full, "--format", "topk", "--output", compact)
        assert code == 1
        assert "already exists" in err

    def test_the_chat_template_comes_along(
        self, capsys: pytest.CaptureFixture[str], compact: Path, tmp_path: Path
    ) -> None:
        source = tmp_path / "source"
        shutil.copytree(compact, source)
        for name in ("chat_template.jinja", "tokenizer_config.json", "README.md"):
            (source / name).write_text("{}")
        assert run(capsys, "export", source, "--format", "lora", "--output", tmp_path / "out")[0] == 0
        written = {path.name for path in (tmp_path / "out").iterdir()}
        assert written == {
            "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer_config.json"
        }  # fmt: skip


class TestPlainLora:
    @pytest.fixture
    def plain(self, model: PreTrainedModel, tmp_path: Path) -> Path:
        fields: dict[str, Any] = {"target_modules": ["q_proj"], "lora_alpha": 3, "use_rslora": True}
        return make_lora(model, tmp_path / "plain", rank_pattern={"layers.1.*": 2}, **fields)

    def test_inspect(self, capsys: pytest.CaptureFixture[str], plain: Path, base: Path) -> None:
        code, out, _ = run(capsys, "inspect", plain, "--model", base)
        assert code == 0
        assert "plain LoRA      alpha 3, divided by √rank" in out
        assert "patterns        1 of ranks, 0 of alphas" in out
        assert "storage         lora, " in out
        assert "resumable       yes" in out
        assert "\nLoRA params to-be-saved: 768 || total params to-be-saved: 768\n" in out
        assert "vblora" not in out
        found = run_json(capsys, "inspect", plain)
        assert (found["parameters"]["lora_params"], found["parameters"]["num_vectors"]) == (768, None)

    def test_blended_with_vb_lora_it_is_a_lora(
        self, capsys: pytest.CaptureFixture[str], plain: Path, compact: Path, tmp_path: Path
    ) -> None:
        code, out, _ = run(capsys, "blend", f"{plain}:0.5", f"{compact}:-1", "--output", tmp_path / "out")
        assert code == 0
        assert "rank 8, plain LoRA" in out
        assert run_json(capsys, "inspect", tmp_path / "out")["parameters"]["storage"] == "lora"

    def test_export(self, capsys: pytest.CaptureFixture[str], plain: Path, compact: Path, tmp_path: Path) -> None:
        assert run(capsys, "export", compact, "--format", "lora", "--output", tmp_path / "out")[0] == 0
        assert run_json(capsys, "inspect", tmp_path / "out")["parameters"]["storage"] == "lora"
        code, _, err = run(capsys, "export", plain, "--format", "topk", "--output", tmp_path / "back")
        assert code == 1
        assert "export it as 'lora'" in err
        assert not (tmp_path / "back").exists()
