"""What is measured: the shapes of base models and adapters, and how much work each measure does."""

from __future__ import annotations

from dataclasses import dataclass

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama, with random weights."""

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int = 12
    intermediate: int = 2048
    vocabulary: int = 8192
    context: int = 1024


@dataclass(frozen=True, slots=True)
class AdapterShape:
    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    targets: tuple[str, ...] = ALL_LINEAR


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """`prompt` and `output` are the least and the most tokens of a request; `rows` is the batch of a decode step."""

    model: ModelShape = ModelShape()
    adapter: AdapterShape = AdapterShape()
    adapters: int = 16  # that exist; decode steps mix up to all of them
    requests: int = 32
    request_adapters: int = 8  # that the requests are spread over
    prompt: tuple[int, int] = (16, 128)
    output: tuple[int, int] = (16, 128)
    checked_requests: int = 4
    peft_batch: int = 8
    rows: int = 16
    decode_context: int = 64
    decode_steps: int = 100
    fold_steps: int = 20  # between a fold and its restore
    running_rows: int = 8  # that decode while a cold adapter is loaded
    probe_prompt: int = 64
    flood: int = 500  # requests of one adapter, while another's lone request comes
    flood_output: int = 128
    lone_requests: int = 8


@dataclass(frozen=True, slots=True)
class ResidencySizes:
    """The linear layers that matter are as wide as a 7B model's; the rest is small, so that it fits a small machine."""

    model: ModelShape = ModelShape(
        hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=256, vocabulary=512, context=512
    )
    adapter: AdapterShape = AdapterShape(targets=("q_proj", "v_proj"))
    answering: int = 32  # adapters that answer one request each, all at once
    prompt: int = 8
    output: int = 4


@dataclass(frozen=True, slots=True)
class ServingSizes:
    """`prompt` and `output` are the least and the most tokens of a request, `requests` those of a closed loop."""

    model: ModelShape = ModelShape()
    adapter: AdapterShape = AdapterShape()
    adapters: int = 16  # that the requests are spread over
    clients: int = 16
    requests: int = 32
    prompt: tuple[int, int] = (16, 128)
    output: tuple[int, int] = (16, 64)
    checked_output: tuple[int, int] = (8, 16)  # of the requests whose answers are compared before anything is timed
    peft_batch: int = 8
    offered: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)  # requests a second
    arrivals: int = 24  # at each rate
    step_adapters: tuple[int, ...] = (1, 8, 64)  # that are used; the last is the number of rows, too
    decode_context: int = 64
    decode_steps: int = 20
    memory_adapters: tuple[int, ...] = (1, 8, 64, 512, 4096)
    peft_memory_adapters: tuple[int, ...] = (1, 8, 64)


@dataclass(frozen=True, slots=True)
class StartupSizes:
    """A model so large that its weights count, not only the packages' imports."""

    model: ModelShape = ModelShape(hidden=1536, intermediate=4096)
    adapter: AdapterShape = AdapterShape()
    adapters: int = 16  # registered at the start


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """Decode steps of a 7B Llama, at `context` tokens in a row, and answers of a small one that are compared."""

    model: ModelShape = ModelShape(
        hidden=4096, layers=32, heads=32, kv_heads=32, intermediate=11008, vocabulary=32000, context=2048
    )
    adapter: AdapterShape = AdapterShape()
    rows: tuple[int, ...] = (1, 16, 64)
    context: int = 100
    kv_memory: int = 20 << 30  # of which half is reserved
    resident: int = 10_000  # adapters in the tables at once
    cold: int = 8  # that are read and composed, one after the other
    checked_model: ModelShape = ModelShape(
        hidden=512, layers=4, heads=8, kv_heads=4, intermediate=1024, vocabulary=2048, context=256
    )
    checked_adapters: int = 12
    checked_requests: int = 64
    checked_rows: int = 12


@dataclass(frozen=True, slots=True)
class ScaleSizes:
    """`few` adapters are used by the loop, `adapters` where only `resident` fit a replica's memory at a time."""

    model: ModelShape = ModelShape()
    adapter: AdapterShape = AdapterShape()
    adapters: int = 24
    few: int = 4
    resident: int = 17
    clients: int = 8
    requests: int = 24
    prompt: tuple[int, int] = (16, 64)
    output: tuple[int, int] = (8, 32)
    lone_requests: int = 24  # one after the other, each of one token
    mixed_requests: int = 96  # over all adapters, by chance
    mixed_prompt: tuple[int, int] = (8, 16)
    mixed_output: tuple[int, int] = (1, 4)


_TINY_MODEL = ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocabulary=256, context=256)
_TINY_ADAPTER = AdapterShape(num_vectors=32, vector_length=16)

QUICK_ENGINE = EngineSizes(
    model=_TINY_MODEL,
    adapter=_TINY_ADAPTER,
    adapters=8,
    requests=6,
    request_adapters=3,
    prompt=(4, 12),
    output=(4, 12),
    checked_requests=2,
    peft_batch=2,
    rows=4,
    decode_context=8,
    decode_steps=4,
    fold_steps=2,
    running_rows=2,
    probe_prompt=8,
    flood=12,
    flood_output=16,
    lone_requests=2,
)
QUICK_GRAPHS = GraphSizes(
    model=_TINY_MODEL,
    adapter=_TINY_ADAPTER,
    rows=(1, 4),
    context=8,
    kv_memory=64 << 20,
    resident=20,
    cold=2,
    checked_model=_TINY_MODEL,
    checked_adapters=3,
    checked_requests=6,
    checked_rows=3,
)
QUICK_RESIDENCY = ResidencySizes(
    model=_TINY_MODEL, adapter=AdapterShape(num_vectors=32, vector_length=16, targets=("q_proj", "v_proj")), answering=4
)
QUICK_SERVING = ServingSizes(
    model=_TINY_MODEL,
    adapter=_TINY_ADAPTER,
    adapters=3,
    clients=3,
    requests=6,
    prompt=(4, 12),
    output=(4, 12),
    checked_output=(4, 8),
    peft_batch=2,
    offered=(20.0, 40.0),
    arrivals=4,
    step_adapters=(1, 4),
    decode_context=8,
    decode_steps=4,
    memory_adapters=(1, 3),
    peft_memory_adapters=(1,),
)
QUICK_STARTUP = StartupSizes(model=_TINY_MODEL, adapter=_TINY_ADAPTER, adapters=2)
QUICK_SCALE = ScaleSizes(
    model=_TINY_MODEL,
    adapter=_TINY_ADAPTER,
    adapters=8,
    few=2,
    resident=6,
    clients=2,
    requests=4,
    prompt=(4, 12),
    output=(4, 8),
    lone_requests=3,
    mixed_requests=24,
)
