"""Receipts of a real server, recomputed with PEFT by the command; and what is changed is found out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from service.api.receipt import hash_of_tokens, id_of
from service.cli import main
from tests.factories import AdapterSpec, make_adapter, save_model, tiny_model
from tests.lora_factory import make_lora
from tests.server import Server

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SPECS = {
    "compact": AdapterSpec(seed=1),
    "full": AdapterSpec(seed=2, compact=False, target_modules="all-linear"),
    "half": AdapterSpec(seed=3, dtype=torch.bfloat16, topk=3, vector_length=8),
    "biased": AdapterSpec(seed=4, bias="all"),
}
PROMPT = "The quick brown fox"
GREEDY = {"temperature": 0, "max_new_tokens": 24}


@dataclass(frozen=True)
class Case:
    server: Server
    folder: Path

    def ask(self, **fields: Any) -> dict[str, Any]:
        return self.post("/v1/generate", prompt=PROMPT, receipt="full", **fields)

    def post(self, route: str, **fields: Any) -> dict[str, Any]:
        response = self.server.http.post(route, json=fields)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def save(self, content: Any, name: str = "receipt.json") -> Path:
        path = self.folder / name
        path.write_text(json.dumps(content))
        return path


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("replay")
    model = tiny_model("qwen2")  # whose attention has biases
    save_model(model, folder / "base")
    save_model(tiny_model("qwen2", seed=1), folder / "other-base")
    for name, spec in SPECS.items():
        make_adapter(model, spec, folder / name)
    make_lora(model, folder / "plain", target_modules="all-linear", lora_alpha=3)
    adapters = [f"--adapter={name}={folder / name}" for name in (*SPECS, "plain")]
    with Server("serve", "--model", str(folder / "base"), *adapters, data_dir=folder / "data") as server:
        yield Case(server, folder)


class Replay:
    """Runs the command on receipts of a case."""

    def __init__(self, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
        self.case = case
        self._capsys = capsys

    def run(self, content: Any, *arguments: str, base: str = "base", **places: str) -> tuple[int, str, str]:
        """`places` are directories of adapters that are not where their names say."""
        receipt = content.get("receipt", content)
        names = [adapter["name"] for adapter in receipt["selection"]["adapters"]]
        given = [f"--adapter={name}={self.case.folder / places.get(name, name)}" for name in names]
        model = str(self.case.folder / base)
        code = main(["replay", str(self.case.save(content)), "--model", model, *given, *arguments])
        out, err = self._capsys.readouterr()
        return code, out, err

    def report(self, content: Any, *arguments: str, **where: str) -> tuple[int, dict[str, Any]]:
        code, out, err = self.run(content, "--json", *arguments, **where)
        assert out, err
        report: dict[str, Any] = json.loads(out)
        assert report["equal"] is (code == 0)
        return code, report

    def equal(self, content: Any, *arguments: str, **where: str) -> list[dict[str, Any]]:
        """The choices of a receipt that must replay equal."""
        code, report = self.report(content, *arguments, **where)
        assert code == 0, report
        choices: list[dict[str, Any]] = report["choices"]
        assert choices
        return choices


@pytest.fixture
def replay(case: Case, capsys: pytest.CaptureFixture[str]) -> Replay:
    return Replay(case, capsys)


def resealed(receipt: dict[str, Any]) -> dict[str, Any]:
    """A receipt whose id is right again, as a careful forger would make it."""
    return {**receipt, "id": id_of(receipt)}


BLEND = [{"name": "compact", "weight": 0.7}, {"name": "full", "weight": -0.4}, {"name": "half", "weight": 0.3}]
SELECTIONS: dict[str, dict[str, Any]] = {
    "base": {"adapter": "base"},
    **{name: {"adapter": name} for name in SPECS},
    "half of one": {"adapters": [{"name": "compact", "weight": 0.5}]},
    "blend": {"adapters": BLEND},
    "plain LoRA": {"adapter": "plain"},
    "blend with plain LoRA": {"adapters": [{"name": "plain", "weight": 0.6}, {"name": "compact", "weight": -0.4}]},
    "blend of biases": {"adapters": [{"name": "biased", "weight": 0.6}, {"name": "compact", "weight": 0.4}]},
}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("mode", ["switch", "merge"])
def test_greedy_replays_equal(case: Case, replay: Replay, selection: str, mode: str) -> None:
    answer = case.ask(**GREEDY, **SELECTIONS[selection], mode=mode, ignore_eos=True)
    ran = answer["receipt"]["selection"]["mode"]
    assert ran == mode or selection in ("base", "biased", "blend of biases"), "else merging is not tested"
    (choice,) = replay.equal(answer["receipt"])
    assert (choice["tokens"], choice["finish_reason"]) == (24, "length")


SAMPLINGS: dict[str, dict[str, Any]] = {
    "hot": {"temperature": 1.5},
    "cut": {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"temperature": 1.1, "repetition_penalty": 1.3},
    "seeded": {"seed": 2**63 - 2},
    "stopped": {"seed": 3, "temperature": 1.2, "stop": ["a", "e", "\x00"], "stop_token_ids": list(range(100))},
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sampled_choices_replay_equal(case: Case, replay: Replay, sampling: str) -> None:
    answer = case.ask(adapters=BLEND[:2], n=3, max_new_tokens=16, **SAMPLINGS[sampling])
    choices = replay.equal(answer["receipt"])
    assert len({tuple(choice["token_ids"]) for choice in answer["choices"]}) == len(choices) == 3
    if sampling == "stopped":
        assert "stop" in {choice["finish_reason"] for choice in choices}


def test_openais_routes_replay_equal_with_penalties_biases_grammars_and_chats(case: Case, replay: Replay) -> None:
    fields = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "logit_bias": {"65": 3, "66": -100}, "seed": -5}
    asked = {"model": "compact:0.5+full", "max_tokens": 16, "receipt": "full", **fields}
    replay.equal(case.post("/v1/completions", prompt=PROMPT, n=2, **asked))
    replay.equal(case.post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], **asked))
    guided = case.post("/v1/completions", prompt=PROMPT, guided_regex="[a-f]{5}[0-9]+", **asked)
    replay.equal(guided)
    del asked["receipt"]
    hashed = case.post("/v1/completions", prompt=PROMPT, guided_regex="[a-f]{5}", receipt=True, **asked)
    (case.folder / "prompt.txt").write_text(PROMPT)
    code, _, err = replay.run(hashed, "--prompt-file", str(case.folder / "prompt.txt"))
    assert code == 2
    assert "only the hash of its grammar" in err


def test_a_receipt_of_hashes_takes_the_prompt_from_a_file(case: Case, replay: Replay) -> None:
    answer = case.post("/v1/generate", prompt=PROMPT, adapter="compact", receipt=True, **GREEDY)
    code, _, err = replay.run(answer)
    assert code == 2
    assert "--prompt-file" in err
    file = case.folder / "prompt.txt"
    for content in (PROMPT, f"{PROMPT}\n", json.dumps(list(PROMPT.encode()))):
        file.write_text(content)
        replay.equal(answer, "--prompt-file", str(file))  # the answer around it holds the output's token ids
        replay.equal(answer["receipt"], "--prompt-file", str(file))
    file.write_text("another")
    code, report = replay.report(answer, "--prompt-file", str(file))
    assert (code, [each["what"] for each in report["mismatches"]]) == (1, ["prompt"])


def test_a_stored_adapters_other_files_do_not_count(case: Case, replay: Replay) -> None:
    answer = case.ask(adapter="compact", **GREEDY)
    shutil.copytree(case.folder / "compact", case.folder / "with-readme")
    (case.folder / "with-readme" / "README.md").write_text("# Mine")
    (case.folder / "with-readme" / "tokenizer_config.json").write_text("{}")
    replay.equal(answer, compact="with-readme")


# --- what differs ---------------------------------------------------------------------------------


def test_a_changed_receipt_is_noticed(case: Case, replay: Replay) -> None:
    receipt = case.ask(adapter="compact", **GREEDY)["receipt"]
    changed = {**receipt, "sampling": {**receipt["sampling"], "temperature": 0.5}}
    code, out, _ = replay.run(changed)
    assert code == 1
    assert "differs: the receipt was changed after it was issued" in out
    code, report = replay.report(changed)
    assert [each["what"] for each in report["mismatches"]] == ["receipt"]
    assert report["choices"] == []


def test_the_first_differing_token_is_named_with_its_margin(case: Case, replay: Replay) -> None:
    receipt = case.ask(adapter="compact", **GREEDY, ignore_eos=True)["receipt"]
    (choice,) = receipt["choices"]
    ids = [*choice["token_ids"][:5], (choice["token_ids"][5] + 1) % 256, *choice["token_ids"][6:]]
    forged = resealed({**receipt, "choices": [{**choice, "token_ids": ids, "sha256": hash_of_tokens(ids)}]})
    code, report = replay.report(forged)
    assert (code, report["mismatches"]) == (1, [])
    (replayed,) = report["choices"]
    difference = replayed["difference"]
    assert (difference["position"], difference["receipt"], difference["replay"]) == (5, ids[5], choice["token_ids"][5])
    assert difference["margin"] > 0
    _, out, _ = replay.run(forged)
    assert f"choice 0: differs at token 5: the receipt has {ids[5]} (" in out
    assert re.search(r"\), \+[0-9.e-]+ in log-probability$", out, re.MULTILINE)


def test_outputs_cut_short_or_drawn_out_are_named(case: Case, replay: Replay) -> None:
    receipt = case.ask(adapter="compact", **GREEDY, ignore_eos=True)["receipt"]
    (choice,) = receipt["choices"]
    own = choice["token_ids"]
    for ids, expected in ((own[:-4], (20, None, own[20])), ([*own, 7], (24, 7, None))):
        changed = {**choice, "token_ids": ids, "tokens": len(ids), "sha256": hash_of_tokens(ids)}
        code, report = replay.report(resealed({**receipt, "choices": [changed]}))
        difference = report["choices"][0]["difference"]
        assert code == 1
        assert (difference["position"], difference["receipt"], difference["replay"]) == expected
        assert difference["margin"] is None


def test_without_token_ids_a_difference_is_noticed_and_not_placed(case: Case, replay: Replay) -> None:
    receipt = case.ask(adapter="compact", **GREEDY)["receipt"]
    (choice,) = receipt["choices"]
    forged = {**receipt, "choices": [{**choice, "token_ids": None, "sha256": hash_of_tokens([1, 2, 3])}]}
    code, out, _ = replay.run(resealed(forged))
    assert code == 1
    assert "only the token ids would show" in out


def test_an_answer_that_is_not_its_receipts_is_noticed(case: Case, replay: Replay) -> None:
    answer = case.post("/v1/generate", prompt=list(PROMPT.encode()), adapter="compact", receipt=True, **GREEDY)
    answer["choices"][0]["token_ids"][3] += 1
    (case.folder / "prompt.json").write_text(json.dumps(list(PROMPT.encode())))
    code, report = replay.report(answer, "--prompt-file", str(case.folder / "prompt.json"))
    assert (code, [each["what"] for each in report["mismatches"]]) == (1, ["output"])


def test_other_adapters_and_bases_are_named_before_anything_is_computed(case: Case, replay: Replay) -> None:
    answer = case.ask(adapters=BLEND[:2], **GREEDY)
    code, report = replay.report(answer, full="half")
    assert (code, report["choices"]) == (1, [])
    (mismatch,) = report["mismatches"]
    assert mismatch["what"] == "adapter"
    assert answer["receipt"]["selection"]["adapters"][1]["digest"] in mismatch["message"]
    code, report = replay.report(answer, base="other-base")
    assert (code, report["choices"]) == (1, [])
    (mismatch,) = report["mismatches"]
    assert mismatch["what"] == "base"
    assert answer["receipt"]["base"]["fingerprint"] in mismatch["message"]


def test_a_forged_selection_gives_other_tokens(case: Case, replay: Replay) -> None:
    receipt = case.ask(adapters=BLEND[:2], **GREEDY, ignore_eos=True)["receipt"]
    first, second = receipt["selection"]["adapters"]
    selection = {**receipt["selection"], "adapters": [{**first, "weight": -0.7}, second]}
    code, report = replay.report(resealed({**receipt, "selection": selection}))
    assert code == 1
    assert report["choices"][0]["difference"]["margin"] > 0


# --- what is asked wrongly ------------------------------------------------------------------------


def test_what_is_missing_or_too_much_is_a_usage_error(
    case: Case, replay: Replay, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = case.ask(adapter="compact", **GREEDY)
    receipt, model = str(case.save(answer)), str(case.folder / "base")

    def refused(*arguments: str) -> str:
        assert main(["replay", *arguments]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    assert "say where it is with --adapter compact=DIR" in refused(receipt, "--model", model)
    assert "expected NAME=DIRECTORY" in refused(receipt, "--model", model, "--adapter", "compact")
    wrong = ("--adapter", f"nobody={case.folder / 'full'}")
    assert "names no adapter 'nobody': 'compact' ran" in refused(receipt, "--model", model, *wrong)
    for content, message in (
        ("[1]", "holds no receipt"),
        ("{", "is not JSON"),
        ('{"format": 2}', "holds no receipt that this version reads"),
        ('{"receipt": null}', "holds no receipt"),
    ):
        (case.folder / "wrong.json").write_text(content)
        assert message in refused(str(case.folder / "wrong.json"), "--model", model)


def test_without_peft_it_says_what_to_install(case: Case, replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.commands.replay_model.find_spec", lambda name: None)
    code, _, err = replay.run(case.ask(adapter="compact", **GREEDY))
    assert code == 1
    assert "pip install 'vblora-serve[replay]'" in err
    replay.equal(case.ask(adapter="base", **GREEDY))  # which needs none


def test_tokens_that_the_model_has_not_are_refused(case: Case, replay: Replay) -> None:
    receipt = case.ask(adapter="compact", **GREEDY)["receipt"]
    prompt = {**receipt["prompt"], "token_ids": [5000], "sha256": hash_of_tokens([5000])}
    code, _, err = replay.run(resealed({**receipt, "prompt": prompt}))
    assert code == 1
    assert "outside the vocabulary (0 to 271)" in err
