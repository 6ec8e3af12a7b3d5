"""Uploads the trained adapters to servers, asks them, and holds the answers against PEFT's own.

    python serve_and_compare.py --output work
    python serve_and_compare.py --output work --classifier-url http://127.0.0.1:8001 --writer-url http://127.0.0.1:8002

Without the addresses it starts a server for each task, and ends them. Exits with 1 if an answer is not PEFT's.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
import torch
from peft import PeftModel
from sentences import LABELS, train_and_held_out
from serving import checked, client_of, running_server
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

SENTENCES = [example.text for example in train_and_held_out()[1][:6]]
PROMPTS = ["The adapter", "A server", "Training can go on"]
NEW_TOKENS = 24


def main() -> None:
    options = parse()
    classifier, writer = options.output / "classifier" / "compact", options.output / "writer" / "compact"
    with ExitStack() as opened:  # both start while the other does
        classifier_url = options.classifier_url or opened.enter_context(serve(classifier, "classify"))
        writer_url = options.writer_url or opened.enter_context(serve(writer, "generate"))
        with client_of(classifier_url) as server:
            upload(server, "topics", classifier)
            compare_classes(server, classifier)
        with client_of(writer_url) as server:
            push(writer_url, "writer", writer)
            compare_texts(server, writer)


def serve(adapter: Path, task: str):  # a context manager
    """A server over the base that the adapter was trained on, with a data directory beside it."""
    options = [
        "--model",
        base_of(adapter),
        "--task",
        task,
        "--data-dir",
        str(adapter.parent / "data"),
        "--threads",
        "1",
    ]
    return running_server(*options, log=adapter.parent / "server.log")


def base_of(adapter: Path) -> str:
    return json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]


# --- the classifier -------------------------------------------------------------------------------


def upload(server: httpx.Client, name: str, adapter: Path) -> None:
    """The adapter's files in a form, with the names of its classes."""
    parts = {"config": "adapter_config.json", "weights": "adapter_model.safetensors", "labels": "labels.json"}
    files = {part: (adapter / file).read_bytes() for part, file in parts.items()}
    stored = checked(server.post("/v1/adapters?replace=true", data={"name": name}, files=files))
    print(f"{name}: {stored['digest']}, {stored['file_bytes']:,} bytes, {stored['vblora_params']:,} parameters")
    checked(server.post(f"/v1/adapters/{name}/activate"))


def compare_classes(server: httpx.Client, adapter: Path) -> None:
    """Of sentences that were not trained on. The adapter is active: the request need not name it."""
    answers = checked(server.post("/v1/classify", json={"input": SENTENCES}))["data"]
    for sentence, answer, probs in zip(SENTENCES, answers, pefts_probabilities(adapter, SENTENCES), strict=True):
        off = max(abs(one - other) for one, other in zip(answer["probs"], probs, strict=True))
        print(f"  {answer['label']:>7} {max(answer['probs']):.3f}  {sentence}")
        if off > 1e-4 or answer["label"] != LABELS[probs.index(max(probs))]:
            raise SystemExit(f"PEFT answers {probs}, the server {answer}")


@torch.inference_mode()
def pefts_probabilities(adapter: Path, texts: Sequence[str]) -> list[list[float]]:
    base = base_of(adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))
    peft = PeftModel.from_pretrained(model, str(adapter)).eval()
    return [peft(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1).tolist() for text in texts]


# --- the writer -----------------------------------------------------------------------------------


def push(url: str, name: str, adapter: Path) -> None:
    """As a deployment would: what the server has already is not sent again."""
    command = [sys.executable, "-m", "service", "push", str(adapter), "--url", url, "--name", name, "--replace"]
    subprocess.run(command, check=True)


def compare_texts(server: httpx.Client, adapter: Path) -> None:
    """Greedy continuations by the adapter, and by the base without it."""
    for prompt, expected in zip(PROMPTS, pefts_tokens(adapter, PROMPTS), strict=True):
        asked = {"prompt": prompt, "temperature": 0, "max_new_tokens": NEW_TOKENS}
        written = checked(server.post("/v1/generate", json={**asked, "adapter": "writer"}))["choices"][0]
        plain = checked(server.post("/v1/generate", json={**asked, "adapter": "base"}))["choices"][0]
        print(f"  {prompt}…\n    writer {written['text']!r}\n    base   {plain['text']!r}")
        if written["token_ids"] != expected:
            raise SystemExit(f"PEFT writes the tokens {expected}, the server {written['token_ids']}")


@torch.inference_mode()
def pefts_tokens(adapter: Path, prompts: Sequence[str]) -> list[list[int]]:
    base = base_of(adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter)
    ).eval()
    written = []
    for prompt in prompts:
        rows = tokenizer(prompt, return_tensors="pt").input_ids
        output = peft.generate(input_ids=rows, max_new_tokens=NEW_TOKENS, do_sample=False)
        written.append(output[0, rows.shape[1] :].tolist())
    return written


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="what the two training scripts were given")
    parser.add_argument("--classifier-url", help="a server that runs already, started with --task classify")
    parser.add_argument("--writer-url", help="a server that runs already, over the writer's base")
    return parser.parse_args()


if __name__ == "__main__":
    main()
