"""An adapter written twice: with every logit, to go on training from, and compact, to be served."""

from pathlib import Path

from peft import PeftModel


def save_both(model: PeftModel, folder: Path) -> None:
    """`folder/trained` can be trained further; `folder/compact` is what a server needs, and smaller.

    The second has the indices and weights of the chosen vectors alone: PEFT refuses to train from it.
    """
    config = model.peft_config["default"]
    config.save_only_topk_weights = False
    model.save_pretrained(str(folder / "trained"))
    config.save_only_topk_weights = True
    model.save_pretrained(str(folder / "compact"))
    config.save_only_topk_weights = False
    sizes = {kind: (folder / kind / "adapter_model.safetensors").stat().st_size for kind in ("trained", "compact")}
    print(", ".join(f"{folder / kind} has {size:,} bytes" for kind, size in sizes.items()))
