"""vLLM's flags in one table, and the simulator's own.

The table is vLLM 0.32's, with a few that later or earlier versions know. What a flag not named in
:class:`Options` means is ignored; that it exists, and how many words it takes, is not.
A parser of its own, since building argparse's for 300 flags takes longer than all the rest of the start.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NoReturn

ONE_WORD = """
    additional-config all2all-backend allowed-headers allowed-local-media-path allowed-methods allowed-origins
    anthropic-disabled-thinking-effort api-server-count attention-backend attention-config aux-output-config
    block-size chat-template chat-template-content-format code-revision cohere-format compilation-config
    config config-format convert cp-kv-cache-interleave-size cpu-distributed-timeout-seconds cpu-offload-gb
    custom-histogram-buckets data-parallel-address data-parallel-backend data-parallel-rank
    data-parallel-rpc-port data-parallel-size data-parallel-size-local data-parallel-start-rank
    data-parallel-supervisor-port dbo-decode-token-threshold dbo-prefill-token-threshold dcp-comm-backend
    dcp-kv-cache-interleave-size decode-context-parallel-size default-chat-template-kwargs default-mm-loras
    device-ids diffusion-config disable-access-log-for-endpoints distributed-executor-backend
    distributed-timeout-seconds download-dir dp-supervisor-probe-failure-threshold
    dp-supervisor-probe-interval-s dp-supervisor-probe-timeout-s dp-sync-interval dtype ec-manager-config
    ec-transfer-config elastic-ep-max-dp-size engram-config eplb-config expert-placement-strategy
    fault-tolerance-config fingerprint-mode fingerprint-value gdn-prefill-backend generation-config
    gpu-memory-utilization grpc-port h11-max-header-count h11-max-incomplete-event-size hf-config-path
    hf-overrides hf-token host io-processor-plugin ir-op-priority jit-monitor-mode kda-decode-backend
    kda-prefill-backend kernel-config kv-cache-dtype kv-cache-memory-bytes kv-cache-metrics-sample
    kv-events-config kv-offloading-backend kv-offloading-size kv-transfer-config limit-mm-per-prompt
    linear-backend load-format log-config-file log-level logging-config logprobs-mode
    long-prefill-token-threshold lora-dtype mamba-backend mamba-block-size mamba-cache-dtype mamba-cache-mode
    mamba-cache-philox-rounds mamba-ssm-cache-dtype mamba-ssu-algorithm master-addr master-port max-cpu-loras
    max-cudagraph-capture-size max-log-len max-logprobs max-lora-cls-labels max-lora-rank max-loras
    max-model-len max-num-active-seqs max-num-batched-tokens max-num-queued-reqs max-num-queued-tokens
    max-num-scheduled-tokens max-num-seqs max-parallel-loading-workers media-io-kwargs middleware
    mm-encoder-attn-backend mm-encoder-attn-dtype mm-encoder-fp8-scale-path mm-encoder-fp8-scale-save-margin
    mm-encoder-fp8-scale-save-path mm-encoder-tp-mode mm-hasher-algorithm mm-ipc-gpu-memory-gb
    mm-processor-cache-gb mm-processor-cache-type mm-processor-device mm-processor-kwargs
    mm-shm-cache-max-object-size-mb mm-tensor-ipc model model-class-overrides model-impl
    model-loader-extra-config moe-backend nnodes node-rank num-gpu-blocks-override offload-backend
    offload-group-size offload-num-in-group offload-prefetch-step optimization-level otlp-traces-endpoint
    override-generation-config per-request-spec-decode-metrics performance-mode pipeline-parallel-size
    pooler-config port prefill-context-parallel-size prefill-schedule-interval prefix-cache-retention-interval
    prefix-caching-hash-algo prefix-match-unit profiler-config pt-load-map-location quantization
    quantization-config reasoning-config reasoning-parser reasoning-parser-plugin renderer-num-workers
    replayssm-buffer-len response-role revision root-path runner safetensors-load-strategy
    safetensors-prefetch-block-size safetensors-prefetch-num-threads scheduler-cls scheduling-policy seed
    show-hidden-metrics-for-version shutdown-timeout sparse-indexer-topk-backend spec-method spec-model
    spec-tokens speculative-config sse-keep-alive-interval ssl-ca-certs ssl-cert-reqs ssl-certfile ssl-ciphers
    ssl-keyfile stream-interval structured-outputs-config tensor-parallel-size tokenizer tokenizer-mode
    tokenizer-revision tool-call-parser tool-parser-plugin tool-server tool-strict-level ubatch-size uds
    uvicorn-log-level video-pruning-method video-pruning-rate watermark watermark-config
    weight-transfer-config worker-cls worker-extension-cls
"""
SEVERAL_WORDS = """
    allowed-media-domains api-key collect-detailed-traces cpu-offload-params cudagraph-capture-sizes
    ignore-patterns kv-cache-dtype-skip-layers logits-processors lora-modules lora-target-modules
    numa-bind-cpus numa-bind-nodes offload-params served-model-name sleep-preserve-parameter-names
"""
ON_OR_OFF = """
    allow-credentials allow-deprecated-quantization async-scheduling cohere-is-reasoning-model
    cudagraph-metrics data-parallel-external-lb data-parallel-hybrid-lb dcp-q-replicate disable-cascade-attn
    disable-chunked-mm-input disable-custom-all-reduce disable-fastapi-docs disable-hybrid-kv-cache-manager
    disable-log-requests disable-nccl-for-dp-synchronization disable-sliding-window disable-uvicorn-access-log
    enable-auto-tool-choice enable-batch-sharded-sampling enable-chunked-prefill enable-cumem-allocator
    enable-dbo enable-elastic-ep enable-ep-weight-filter enable-eplb enable-expert-parallel
    enable-fault-tolerance enable-flash-late-interaction enable-flashinfer-autotune enable-force-include-usage
    enable-hc-sp enable-layerwise-nvtx-tracing enable-log-deltas enable-log-outputs enable-log-requests
    enable-logging-iteration-details enable-lora enable-mamba-cache-stochastic-rounding
    enable-mamba-shared-prefix-checkpoint enable-mfu-metrics enable-mixed-moe-lora-format enable-mm-embeds
    enable-moe-shared-loras enable-nccl-comm-suspend enable-offline-docs enable-per-request-metrics
    enable-prefix-caching enable-prompt-embeds enable-prompt-tokens-details enable-request-id-headers
    enable-return-routed-experts enable-scale-out enable-server-load-tracking enable-shm-tensor-arena
    enable-sleep-mode enable-ssl-refresh enable-tokenizer-info-endpoint enable-tower-connector-lora
    enable-trace-replay enforce-eager exclude-tools-when-tool-choice-none fail-on-environ-validation
    fully-sharded-loras interleave-mm-strings jit-monitor-verbose kv-cache-metrics kv-sharing-fast-prefill
    language-model-only log-error-stack long-prefill-token-threshold-adaptive mm-device-do-normalize
    mm-encoder-only numa-bind ray-workers-use-nsight return-sampling-mask return-tokens-as-token-ids
    scheduler-reserve-full-isl skip-mm-profiling skip-tokenizer-init sleep-mode-offload-cudagraph
    specialize-active-lora swa-bounded-replay tokens-only trust-remote-code trust-request-chat-template
    trust-request-mm-kwargs use-fp64-gumbel use-replayssm use-tqdm-on-load
"""
ON = """
    aggregate-engine-logging data-parallel-multi-port-external-lb disable-log-stats grpc headless
"""
SIMULATED_ONE_WORD = """
    simulate-death-seconds simulate-exit-after simulate-exit-code simulate-fail simulate-linger-seconds
    simulate-load-seconds simulate-token-ms simulate-weights-mib
"""
SIMULATED_ON = "simulate-hang simulate-ignore-sigterm"
SHORT = {
    "-ac": "attention-config",
    "-asc": "api-server-count",
    "-cc": "compilation-config",
    "-dc": "diffusion-config",
    "-dcp": "decode-context-parallel-size",
    "-dp": "data-parallel-size",
    "-dpa": "data-parallel-address",
    "-dpb": "data-parallel-backend",
    "-dpe": "data-parallel-external-lb",
    "-dph": "data-parallel-hybrid-lb",
    "-dpl": "data-parallel-size-local",
    "-dpn": "data-parallel-rank",
    "-dpp": "data-parallel-rpc-port",
    "-dpr": "data-parallel-start-rank",
    "-ep": "enable-expert-parallel",
    "-n": "nnodes",
    "-O": "optimization-level",
    "-pcp": "prefill-context-parallel-size",
    "-pp": "pipeline-parallel-size",
    "-q": "quantization",
    "-r": "node-rank",
    "-sc": "speculative-config",
    "-tp": "tensor-parallel-size",
}
WORDS = (
    dict.fromkeys((ONE_WORD + SIMULATED_ONE_WORD).split(), "one")
    | dict.fromkeys(SEVERAL_WORDS.split(), "several")
    | dict.fromkeys(ON_OR_OFF.split(), "on or off")
    | dict.fromkeys(f"{ON} {SIMULATED_ON}".split(), "on")
)
"""How many words each flag takes."""
DEFAULT_MODEL = "Qwen/Qwen3-0.6B"
FAILURES = ("none", "load", "oom", "exit")
LARGE = ("kv-cache-memory-bytes", "max-model-len", "max-num-batched-tokens")
"""The numbers that vLLM also reads as people write them: ``32k``, ``1.5g``, ``80G``."""
MULTIPLES = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30, "t": 10**12, "T": 2**40}
USAGE = """usage: simulator [-h] --model MODEL [vLLM's flags]
                 [--simulate-load-seconds S] [--simulate-token-ms MS] [--simulate-hang]
                 [--simulate-fail {none,load,oom,exit}] [--simulate-exit-code N] [--simulate-exit-after S]
                 [--simulate-ignore-sigterm] [--simulate-linger-seconds S] [--simulate-death-seconds S]
                 [--simulate-weights-mib N]
"""


@dataclass(frozen=True, slots=True)
class Options:
    """What the flags say, with vLLM's defaults, in its words."""

    model: str = DEFAULT_MODEL
    served_model_names: tuple[str, ...] = ()
    lora_names: tuple[str, ...] = ()
    host: str = ""
    port: int = 8000
    uds: str = ""
    api_keys: tuple[str, ...] = ()
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int = 0
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    max_model_len: int = 4096
    max_num_seqs: int = 256
    shutdown_timeout: float = 0
    access_log: bool = True
    load_s: float = 0
    """How long loading takes."""
    token_s: float = 0
    """How long each token takes."""
    fail: str = "none"
    """``load`` and ``oom`` end the start with 1; ``exit`` ends a ready server."""
    exit_code: int = 1
    exit_after_s: float = 0
    """How long after it became ready ``fail=exit`` ends it."""
    ignore_sigterm: bool = False
    hang: bool = False
    """Ready and healthy, but no request is ever answered."""
    linger_s: float = 0
    """How long what holds the GPU memory outlives a clean stop."""
    death_s: float = 1
    """How long the API server outlives its engine core; 5 in vLLM."""
    weights_mib: int = 0
    """What the pretended model takes of each GPU. The KV cache gets what it leaves, and has to hold ``max_model_len``
    where that is given; with 0 the model takes a share of what there is, and the start never fails for it."""
    given: tuple[tuple[str, str], ...] = ()
    """Flags and values as they were given, for the log."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names under which the model is served; the first is the one that answers and metrics carry."""
        return self.served_model_names or (self.model,)


def parse(argv: list[str]) -> Options:
    """Read a command line; one that vLLM would refuse ends the process with 2, as there."""
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(USAGE)
        raise SystemExit(0)
    return _options(_read(argv))


def _read(argv: list[str]) -> dict[str, list[str]]:
    """The words of each flag; of one that is given twice the last counts."""
    given: dict[str, list[str]] = {}
    unknown: list[str] = []
    rest = argv[1:] if argv[:1] == ["serve"] else list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            if "model_tag" in given:
                unknown.append(word)
            given.setdefault("model_tag", [word])
            continue
        shown, equals, value = word.partition("=")
        if shown[:2] == "-O" and shown[2:].isdigit():
            shown, equals, value = "-O", "=", shown[2:]  # `-O2` is flag and value in one word
        name = _name(shown)
        takes = WORDS.get(name.removeprefix("no-") if name not in WORDS else name)
        if takes is None or (name not in WORDS and takes != "on or off"):
            unknown.append(word)
        elif takes in ("on", "on or off"):
            if equals:
                refuse(f"argument --{name}: ignored explicit argument {value!r}")
            given.pop(name.removeprefix("no-"), None)
            given[name.removeprefix("no-")] = ["no" if name not in WORDS else "yes"]
        else:
            given[name] = [value] if equals else _take(rest, name, several=takes == "several")
    if unknown:
        refuse(f"unrecognized arguments: {' '.join(unknown)}")
    return given


def _name(shown: str) -> str:
    """The name in the table for a flag as written: short, with underscores, or with a dotted key inside it."""
    name, dot, _ = shown.partition(".")
    name = SHORT.get(name, "") or (name[2:].replace("_", "-") if name.startswith("--") else name)
    return name if not dot or WORDS.get(name) == "one" else shown


def _take(rest: list[str], name: str, *, several: bool) -> list[str]:
    """The words after a flag, up to the next flag."""
    taken: list[str] = []
    while rest and (not rest[0].startswith("-") or rest[0][1:2].isdigit()) and (several or not taken):
        taken.append(rest.pop(0))
    if not taken:
        refuse(f"argument --{name}: expected {'at least one argument' if several else 'one argument'}")
    return taken


def refuse(message: str) -> NoReturn:
    """End as argparse does."""
    sys.stderr.write(f"{USAGE}simulator: error: {message}\n")
    raise SystemExit(2)


def _number(given: dict[str, list[str]], name: str, default: float) -> float:
    try:
        return float(given[name][-1]) if name in given else default
    except ValueError:
        refuse(f"argument --{name}: invalid float value: {given[name][-1]!r}")


def _integer(given: dict[str, list[str]], name: str, default: int, least: int = 0) -> int:
    """A whole number of at least that."""
    if name not in given:
        return default
    text = given[name][-1]
    times = MULTIPLES.get(text[-1:], 0) if name in LARGE else 0
    try:
        value = int(float(text[:-1]) * times) if times else int(text)
    except ValueError:
        refuse(f"argument --{name}: invalid int value: {text!r}")
    if value < least:
        refuse(f"argument --{name}: {value} is less than {least}")
    return value


def _options(given: dict[str, list[str]]) -> Options:
    def text(name: str, default: str = "") -> str:
        return given.get(name, [default])[-1]

    fail = text("simulate-fail", "none")
    if fail not in FAILURES:
        refuse(f"argument --simulate-fail: invalid choice: {fail!r} (choose from {', '.join(FAILURES)})")
    longest = given.get("max-model-len", ["auto"])
    if longest[-1] in ("auto", "-1"):  # the model's own, which nobody looks up here
        given = {name: words for name, words in given.items() if name != "max-model-len"}
    share = _number(given, "gpu-memory-utilization", 0.92)
    if not 0 < share <= 1:
        refuse(f"argument --gpu-memory-utilization: {share} is not above 0 and at most 1")
    return Options(
        model=text("model", text("model_tag", DEFAULT_MODEL)),
        served_model_names=tuple(given.get("served-model-name", ())),
        lora_names=tuple(word.partition("=")[0] for word in given.get("lora-modules", ()) if "=" in word),
        host=text("host"),
        port=_integer(given, "port", 8000),
        uds=text("uds"),
        api_keys=tuple(given.get("api-key", ())),
        tensor_parallel_size=_integer(given, "tensor-parallel-size", 1, 1),
        pipeline_parallel_size=_integer(given, "pipeline-parallel-size", 1, 1),
        data_parallel_size=_integer(given, "data-parallel-size", 1, 1),
        gpu_memory_utilization=share,
        kv_cache_memory_bytes=_integer(given, "kv-cache-memory-bytes", 0),
        kv_cache_dtype=text("kv-cache-dtype", "auto"),
        enable_prefix_caching=text("enable-prefix-caching", "yes") == "yes",
        enforce_eager=text("enforce-eager", "no") == "yes",
        max_model_len=_integer(given, "max-model-len", 4096, 1),
        max_num_seqs=_integer(given, "max-num-seqs", 256, 1),
        shutdown_timeout=_number(given, "shutdown-timeout", 0),
        access_log=text("disable-uvicorn-access-log", "no") == "no"
        and text("uvicorn-log-level", "info") in ("info", "debug", "trace"),
        load_s=_number(given, "simulate-load-seconds", 0),
        token_s=_number(given, "simulate-token-ms", 0) / 1000,
        fail=fail,
        exit_code=_integer(given, "simulate-exit-code", 1),
        exit_after_s=_number(given, "simulate-exit-after", 0),
        ignore_sigterm="simulate-ignore-sigterm" in given,
        hang="simulate-hang" in given,
        linger_s=_number(given, "simulate-linger-seconds", 0),
        death_s=_number(given, "simulate-death-seconds", 1),
        weights_mib=_integer(given, "simulate-weights-mib", 0),
        given=tuple((name.replace("-", "_"), " ".join(words)) for name, words in given.items() if name != "api-key"),
    )
