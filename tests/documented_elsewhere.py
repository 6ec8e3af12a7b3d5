"""What the documentation shows and no test runs as it stands: for each page, how a command begins, and why, or which
test runs the same in another way. An entry that begins no command is an error, and so is a test that is not there.
"""

_INSTALLS = "installs into the environment that the tests run in; tests/heavy/test_image.py installs into a new one"
_IMAGE = "tests/heavy/test_image.py: builds the image by deploy/build-image and runs it, without a Docker engine"
_VOLUME = "needs a Docker engine; tests/unit/adapters/test_store_disk.py and test_image.py hold what it rests on"
_GPU = "needs a GPU; tests/gpu runs it on one"
_OTHER_SERVER = "starts another project's server, which is not installed here"
_MINUTES = "tests/unit/benchmarks/test_engine_benchmark.py: the same at tiny sizes"

ELSEWHERE: dict[str, dict[str, str]] = {
    "README.md": {
        "make demo": "tests/demo/test_adapters_generate_their_style.py: the demo's model and adapters, without make",
        "make test": "is what runs this",
        "pip install": _INSTALLS,
    },
    "docs/quickstart.md": {
        "make env": _INSTALLS,
        ". .venv/bin/activate": "the tests' environment stands in for it",
    },
    "docs/api.md": {
        "client = OpenAI(": "tests/api/test_embeddings.py: embeddings need a server with --task embed",
    },
    "docs/benchmarks.md": {
        "python -m benchmarks.engine ": _MINUTES,
        "python -m benchmarks.residency": _MINUTES,
        "python -m benchmarks.families": _MINUTES,
        "python -m benchmarks.blend": _MINUTES,
        "python -m benchmarks.startup": "tests/unit/benchmarks/test_startup.py: the same at tiny sizes",
        "python -m benchmarks.serving": "tests/unit/benchmarks/test_serving.py: the same at tiny sizes",
        "python -m benchmarks.scale": "tests/heavy/test_scale_benchmark.py: the same at tiny sizes",
        "python -m benchmarks.fleet": "tests/unit/benchmarks/test_fleet.py: the same at tiny sizes",
        "python -m benchmarks.soak": "tests/unit/benchmarks/test_soak.py: the same for seconds",
        "python -m benchmarks.kernels": _GPU,
        "python -m benchmarks.decode_graphs": _GPU,
    },
    "docs/performance.md": {
        "pip install": _INSTALLS,
        "python -m benchmarks.kernels ": "tests/unit/benchmarks/test_kernels_benchmark.py: both, without a GPU",
        "python -m benchmarks.decode_graphs ": "tests/unit/benchmarks/test_decode_graphs_benchmark.py: both",
    },
    "docs/docker.md": {
        "docker build --build-arg": _IMAGE,
        "docker build --secret": "needs a private index",
        "docker build …": _IMAGE,
        "pip wheel": "tests/heavy/test_image.py: deploy/build-image collects wheels so",
        "sudo deploy/build-image": _IMAGE,
        "docker run": _IMAGE,
        "docker stop": _VOLUME,
        "    --read-only": _IMAGE,
        "sudo install": "makes a directory of root's",
    },
    "docs/deployment.md": {
        "docker compose": "tests/deploy/test_compose.py: the files, by their schema and against the settings",
        "kubectl": "tests/deploy/test_kubernetes.py: the manifests, by their schemas and against the image",
        "promtool": "tests/heavy/test_prometheus.py: Prometheus itself, where it is installed",
    },
    "docs/scale-out.md": {
        "pip install": _INSTALLS,
        "export AWS_": "are nobody's credentials",
        "vblora-serve serve --model org/base --replicas": "tests/ray/test_replicas.py: two of them",
        "vblora-serve serve": "tests/e2e/test_shared_store.py: servers on one store, in a directory and by S3",
        "export RAY_AUTH_MODE": "belongs to the next",
        "ray ": "starts a Ray on this machine; tests/ray/test_serve_app.py has one of its own",
        "serve ": "tests/ray/test_serve_app.py: the same application, deployed as this command does",
        "vblora-serve doctor": "tests/unit/service/test_doctor.py: on stores of all kinds",
    },
    "docs/cli.md": {
        "vblora-serve demo": "serves on; tests/demo/test_adapters_generate_their_style.py: what it shows",
        "vblora-serve doctor": "tests/unit/service/test_doctor.py: on stores of all kinds",
    },
    "docs/export.md": {
        "vllm serve": _OTHER_SERVER,
        "curl http://127.0.0.1:8000/v1/load_lora_adapter": _OTHER_SERVER,
        "curl http://127.0.0.1:8000/v1/completions": _OTHER_SERVER,
        "pip install": "tests/unit/vblora_vllm/test_resolver.py: the plugin, on vLLM's interface",
        "python -m sglang": _OTHER_SERVER,
        "LORA_ADAPTERS=": _OTHER_SERVER,
    },
    "docs/operations.md": {
        "rsync": "is not installed everywhere; tests/unit/adapters/test_store_banks.py copies as it does",
        "vblora-serve doctor --data-dir DATA_DIR": "tests/unit/service/test_doctor.py: refuses beside a server",
    },
    "examples/demo/README.md": {
        "pip install": _INSTALLS,
        "python examples/demo/train.py": "tests/demo/test_train_script.py: the same with two steps of each",
    },
    "examples/train_to_serve/README.md": {
        "pip install": _INSTALLS,
        "python examples/train_to_serve/": "tests/e2e/test_train_to_serve.py: the first; others download a base",
        "curl": "tests/e2e/test_train_to_serve.py: serve_and_compare.py sends the same",
    },
}

# What a page's Python expects to be there.
PRELUDES = {
    "docs/adapters.md": """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

def load_base():
    torch.manual_seed(0)
    shape = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))

def train(model, name):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        rows = torch.randint(64, (2, 8))
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
""",
}
