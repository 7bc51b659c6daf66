"""What the file asks for, and every fault with its place, its words and what would be right."""

from __future__ import annotations

import json
from dataclasses import astuple, fields

import pytest

from sage_reconcile.core.resolve import HIDDEN, env_file_names, secret_marks
from sage_reconcile.core.spec import Engine, EngineSpec
from sage_reconcile.core.units import Memory
from tests.reading import desired, read, source


def lines(text: str, environ: dict[str, str] | None = None) -> list[str]:
    return [fault.text("f") for fault in read(text, environ)[1]]


def entry(text: str) -> str:
    """An engine entry in a file; it begins on line 4, column 5."""
    return "version: 1\nengines:\n  chat:\n" + "".join(f"    {line}\n" for line in text.splitlines())


def engine(text: str, environ: dict[str, str] | None = None) -> Engine:
    return desired(entry(text), environ).engines[0]


def test_a_plain_file_gives_its_engines_in_order_with_every_default() -> None:
    wanted = desired("version: 1\nengines:\n  b: {model: x, memory: 24GiB}\n  a: {model: y, replicas: 2}\n")
    assert [engine.name for engine in wanted.engines] == ["b", "a"]
    assert wanted.engines[1].replicas() == ("a/0", "a/1")
    spec = wanted.engines[0].spec
    assert (spec.memory, spec.port, spec.gpus, spec.device) == (Memory("mib", 24576), "auto", "auto", "cuda")
    assert (spec.startup_timeout, spec.stop_timeout, spec.replicas) == (1800, 30, 1)
    assert spec.served_model_name == ("b",), "clients ask for the engine by its own name"
    assert wanted.engine("a") is wanted.engines[1]
    assert wanted.engine("none") is None


ADDRESS = "write one such as 127.0.0.1, ::1 or 0.0.0.0, without a port"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("port: 8000", "f:4:5: engines.chat: field `model` is missing; name the model on the hub, or its folder"),
        (
            "model: yes",
            "f:4:12: engines.chat.model: expected text, got `yes`, which YAML reads as true; put it in quotes",
        ),
        ("model: 3", "f:4:12: engines.chat.model: expected text, got the number 3; put it in quotes"),
        (
            "model: -x",
            "f:4:12: engines.chat.model: '-x' would be taken for a flag; begin it with something else than `-`",
        ),
        ("model: m\nmodle: n", "f:5:5: engines.chat.modle: unknown field `modle`; did you mean `model`?"),
        (
            "model: m\nport: 70000",
            "f:5:11: engines.chat.port: 70000 is not a port; write auto or a number from 1 to 65535",
        ),
        (
            "model: m\nport: http",
            ("f:5:11: engines.chat.port: expected a port, got the text 'http'; write auto or a number from 1 to 65535"),
        ),
        ("model: m\nreplicas: 1.5", "f:5:15: engines.chat.replicas: expected a whole number, got the number 1.5"),
        (
            "model: m\nreplicas: -1",
            ("f:5:15: engines.chat.replicas: -1 is impossible; write a value greater than or equal to 0"),
        ),
        (
            "model: m\nreplicas: 10001",
            ("f:5:15: engines.chat.replicas: 10001 is impossible; write a value less than or equal to 10000"),
        ),
        (
            "model: m\nmemory: 24",
            (
                "f:5:13: engines.chat.memory: expected a size, got the number 24; "
                "write auto, a size such as 24GiB, a share such as 30%, all, or manual"
            ),
        ),
        (
            "model: m\nmemory: 101%",
            ("f:5:13: engines.chat.memory: 101% of a GPU is impossible; write more than 0% and at most 100%"),
        ),
        (
            "model: m\ndevice: gpu",
            ("f:5:13: engines.chat.device: expected cuda or cpu, got the text 'gpu'; did you mean `cpu`?"),
        ),
        (
            "model: m\ngpus: []",
            (
                "f:5:11: engines.chat.gpus: expected GPUs, got an empty list; "
                "write auto, or a list such as [0, 1] (index or UUID)"
            ),
        ),
        ("model: m\ngpus: [0, 0]", "f:5:11: engines.chat.gpus: GPU 0 is listed twice; list each GPU once"),
        (
            "model: m\ngpus: [-1]",
            (
                "f:5:11: engines.chat.gpus: the number -1 does not name a GPU; "
                "use its index or its UUID, as `nvidia-smi -L` shows"
            ),
        ),
        (
            "model: m\ngpus: [0]\ntensor_parallel_size: 2",
            (
                "f:5:11: engines.chat.gpus: `gpus` lists 1, but one replica takes 2 (all parallel sizes); "
                "list more GPUs, or lower the parallel sizes"
            ),
        ),
        (
            "model: m\nstartup_timeout: 0",
            ("f:5:22: engines.chat.startup_timeout: 0 is impossible; write a value greater than 0"),
        ),
        (
            "model: m\nstop_timeout: soon",
            (
                "f:5:19: engines.chat.stop_timeout: expected a duration, got the text 'soon'; "
                "write it as 90s, 5m or 1h30m"
            ),
        ),
        ("model: m\npython:", "f:5:5: engines.chat.python: has no value; remove the line, or give it one"),
        ("model: m\nargs: [a]", "f:5:11: engines.chat.args: expected a map, got a list"),
        (
            "model: m\nargs: {foo bar: 1}",
            (
                "f:5:12: engines.chat.args.foo bar: `foo bar` is not a flag's name; "
                "write vLLM's name for it, such as max-model-len"
            ),
        ),
        (
            "model: m\nargs: {max-len: 1, --max_len: 2}",
            "f:5:24: engines.chat.args.--max_len: `--max_len` is given twice, spelled differently; keep one of them",
        ),
        ("model: m\nenv: {1x: a}", "f:5:11: engines.chat.env.1x: `1x` is not the name of an environment variable"),
        (
            "model: m\nenv: {A: yes}",
            ("f:5:11: engines.chat.env.A: `A`: expected text, got true (a yes/no value); put it in quotes"),
        ),
        (
            "model: m\nenv: {VLLM_PORT: 1}",
            (
                "f:5:11: engines.chat.env.VLLM_PORT: `VLLM_PORT` is set by sage-reconcile; "
                "use the field `port`, or `inner_ports` under `host:`"
            ),
        ),
        (
            "model: m\ncommand: serve",
            (
                "f:5:14: engines.chat.command: `command` needs `runtime: command`; "
                "add `runtime: command`, or remove `command`"
            ),
        ),
        (
            "runtime: command",
            (
                "f:4:14: engines.chat.runtime: `runtime: command` needs `command`; "
                "write the command that starts the server"
            ),
        ),
        (
            "runtime: command\ncommand: a {b}",
            (
                "f:5:14: engines.chat.command: unknown placeholder {b}; "
                "use {model} {host} {port} {name}, or {{ and }} for plain braces"
            ),
        ),
        (
            "runtime: command\ncommand: a 'b",
            (
                "f:5:14: engines.chat.command: cannot be split into words: "
                "No closing quotation; close the quote, or write a list of words"
            ),
        ),
        (
            "runtime: command\ncommand: a\nargs: {b: 1}",
            ("f:6:11: engines.chat.args: `args` are vLLM's flags; they mean nothing here; write them into `command`"),
        ),
        (
            "runtime: command\ncommand: 'a {model}'",
            ("f:4:5: engines.chat: field `model` is missing; name the model on the hub, or its folder"),
        ),
        (
            "model: m\ndevice: cpu\ngpus: [0]",
            ("f:6:11: engines.chat.gpus: `gpus` are listed, but `device: cpu` uses none; remove one of the two"),
        ),
        (
            "model: m\ndevice: cpu\nmemory: 30%",
            ("f:6:13: engines.chat.memory: a share of a GPU means nothing with `device: cpu`; write a size, or auto"),
        ),
        (
            "model: m\ndevice: cpu\nmemory: all",
            ("f:6:13: engines.chat.memory: a GPU alone means nothing with `device: cpu`; write a size, or auto"),
        ),
        (
            "model: m\ndevice: cpu\nenv: {VLLM_CPU_KVCACHE_SPACE: 4}",
            (
                "f:6:11: engines.chat.env.VLLM_CPU_KVCACHE_SPACE: `VLLM_CPU_KVCACHE_SPACE` is set by sage-reconcile; "
                "use the field `kv_cache`, or write `memory: manual`"
            ),
        ),
        (
            "model: m\nport: 65535\nreplicas: 2",
            ("f:5:11: engines.chat.port: 2 replicas from port 65535 on go past 65535; start at a lower port"),
        ),
        (
            "model: m\nenv: {A: '${NOPE}'}",
            (
                "f:5:14: engines.chat.env.A: environment variable NOPE is not set; "
                "set it, or give a default: ${NOPE:-value}"
            ),
        ),
        (
            "model: m\nenv: {A: '${}'}",
            ("f:5:14: engines.chat.env.A: ${} is not a variable; write ${NAME} or ${NAME:-default}; $$ is a plain $"),
        ),
        (
            "model: m\nenv: {A: '${open'}",
            ("f:5:14: engines.chat.env.A: ${ is not a variable; write ${NAME} or ${NAME:-default}; $$ is a plain $"),
        ),
    ],
)
def test_a_fault_of_an_engine_names_its_place_and_the_remedy(text: str, expected: str) -> None:
    assert lines(entry(text)) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("engines: {}\n", "f:1:1: field `version` is missing; write `version: 1` at the top"),
        ("version: 2\nengines: {}\n", "f:1:10: version: version 2 is not known; write `version: 1`"),
        ("version: true\nengines: {}\n", "f:1:10: version: version True is not known; write `version: 1`"),
        ("version: 1\n", "f:1:1: field `engines` is missing; write `engines: {}` if none shall run"),
        ("version: 1\nengines:\n", "f:2:1: engines: names no engine; write `engines: {}` if none shall run"),
        ("version: 1\nengines: [a]\n", "f:2:10: engines: expected a map, got a list"),
        ("version: 1\nengine: {}\nengines: {}\n", "f:2:1: engine: unknown field `engine`; did you mean `engines`?"),
        ("version: 1\nhost:\nengines: {}\n", "f:2:1: host: has no value; remove the line, or give it one"),
        ("version: 1\ndefaults: 3\nengines: {}\n", "f:2:11: defaults: expected a map, got the number 3"),
        (
            "version: 1\nengines: {e: }\n",
            "f:2:11: engines.e: says nothing about the engine; give it at least a `model`",
        ),
        ("version: 1\nengines: {e: 3}\n", "f:2:14: engines.e: expected a map, got the number 3"),
        (
            "version: 1\nengines: {-e: {model: m}}\n",
            (
                "f:2:11: engines.-e: '-e' cannot be the name of an engine; use letters, "
                "digits, `-`, `_` and `.`, at most 63, beginning and ending with a letter or digit"
            ),
        ),
        (
            "version: 1\nhost: {bind: foo bar}\nengines: {}\n",
            f"f:2:14: host.bind: 'foo bar' is not an address; {ADDRESS}",
        ),
        (
            "version: 1\nhost: {bind: '127.0.0.1:80'}\nengines: {}\n",
            f"f:2:14: host.bind: '127.0.0.1:80' is not an address; {ADDRESS}",
        ),
        (
            "version: 1\nengines: {a: {model: m, served_model_name: []}}\n",
            "f:2:44: engines.a.served_model_name: an empty list names nothing; name the model, or leave the field out",
        ),
        ("version: 1\nhost: {bnid: x}\nengines: {}\n", "f:2:8: host.bnid: unknown field `bnid`; did you mean `bind`?"),
        (
            "version: 1\nhost: {gpus: all}\nengines: {}\n",
            (
                "f:2:14: host.gpus: expected GPUs, got the text 'all'; "
                "write auto, none, GPUs such as 8xH100-80GB or 4x24GiB, or a list of {name, memory, count}"
            ),
        ),
        (
            "version: 1\nhost: {gpus: '8xH100,4xA100'}\nengines: {}\n",
            "f:2:14: host.gpus: 'A100' may be A100-80GB or A100-40GB; write which",
        ),
        (
            "version: 1\nhost:\n  gpus:\n    - 4xL4\n    - 2xL40Q\nengines: {}\n",
            (
                "f:5:7: host.gpus.1: 'L40Q' names no known GPU; "
                "did you mean L40? or give its memory, as in 4xMyCard:48GiB or 4x48GiB"
            ),
        ),
        (
            "version: 1\nhost: {gpus: ['4xL4,2xT4']}\nengines: {}\n",
            "f:2:15: host.gpus.0: several kinds of GPUs in one item; write each as an item of its own",
        ),
        (
            "version: 1\nhost: {gpus: [4090]}\nengines: {}\n",
            "f:2:15: host.gpus.0: expected GPUs, got the number 4090; put it in quotes if it is a name",
        ),
        (
            "version: 1\nhost: {gpus: [{name: Mine, count: 2}]}\nengines: {}\n",
            ("f:2:15: host.gpus.0: 'Mine' names no known GPU; give its memory, as in 4xMyCard:48GiB or 4x48GiB"),
        ),
        (
            "version: 1\nhost: {gpus: [{name: a, memory: 8GiB, cuont: 2}]}\nengines: {}\n",
            "f:2:39: host.gpus.0.cuont: unknown field `cuont`; did you mean `count`?",
        ),
        (
            "version: 1\nhost: {ports: 9-1}\nengines: {}\n",
            ("f:2:15: host.ports: 9-1 is not a range of ports; write two numbers from 1 to 65535, the lower one first"),
        ),
        (
            "version: 1\nhost: {ports: 8000-8999, inner_ports: 8999-9100}\nengines: {}\n",
            (
                "f:2:39: host.inner_ports: 8999-9100 overlaps `ports` (8000-8999), where engines listen; "
                "choose a range apart from it"
            ),
        ),
        (
            "version: 1\nengines:\n  a: {model: m, port: 8000, replicas: 2}\n  b: {model: m, port: 8001}\n",
            "f:4:23: engines.b.port: port 8001 of b/0 is already the port of a/1; choose another, or write auto",
        ),
        (
            "version: 1\ndefaults: {port: 0}\nengines: {a: {model: m}, b: {model: m}}\n",
            "f:2:18: defaults.port: 0 is not a port; write auto or a number from 1 to 65535",
        ),
        (
            "version: 1\ndefaults: {prot: 0}\nengines: {a: {model: m}, b: {model: m}}\n",
            "f:2:12: defaults.prot: unknown field `prot`; did you mean `port`?",
        ),
    ],
)
def test_a_fault_of_the_file_names_its_place_and_the_remedy(text: str, expected: str) -> None:
    assert lines(text) == [expected]


def test_all_faults_are_told_at_once_in_the_order_of_the_file() -> None:
    told = lines("version: 3\nhost: {bnid: x}\nengines:\n  a: {model: m, port: 0}\n  b: {memory: 24}\n  c:\n")
    assert [line.split(":")[1] for line in told] == ["1", "2", "4", "5", "5", "6"]
    assert "field `model` is missing" in "\n".join(told), "a missing field is told beside a wrong one"


def test_an_unknown_field_that_resembles_nothing_gets_the_whole_list() -> None:
    (told,) = lines(entry("model: m\nxyzzy: 1"))
    assert "vLLM's own flags go under `args:`; known fields: model, runtime," in told


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("model", "the field `model`"),
        ("port", "the field `port`"),
        ("tensor-parallel-size", "the field `tensor_parallel_size`"),
        ("tensor_parallel_size", "the field `tensor_parallel_size`"),
        ("--tensor-parallel-size", "the field `tensor_parallel_size`"),
        ("tp", "the field `tensor_parallel_size`"),
        ("pp", "the field `pipeline_parallel_size`"),
        ("dp", "the field `data_parallel_size`"),
        ("served-model-name", "the field `served_model_name`"),
        ("shutdown-timeout", "the field `stop_timeout`"),
        ("shut", "the field `stop_timeout`"),
        ("api-key", "`env:` with VLLM_API_KEY, since everyone on the machine can read a command line"),
        ("hf-token", "`env:` with HF_TOKEN, since everyone on the machine can read a command line"),
    ],
)
def test_flags_that_we_set_are_refused_under_any_name_that_means_them(flag: str, instead: str) -> None:
    assert lines(entry(f"model: m\nargs: {{{flag}: x}}")) == [
        f"f:5:12: engines.chat.args.{flag}: `{flag}` is set by sage-reconcile; use {instead}"
    ]


@pytest.mark.parametrize("flag", ["gpu-memory-utilization", "gpu-mem", "--kv_cache_memory_bytes", "kv-cache-mem"])
def test_how_much_memory_vllm_takes_is_ours_to_say_but_with_memory_manual(flag: str) -> None:
    plain = flag.lstrip("-").replace("_", "-")
    assert lines(entry(f"model: m\nargs: {{{flag}: 0.5}}")) == [
        (
            f"f:5:12: engines.chat.args.{flag}: `{plain}` is set by sage-reconcile; use the "
            "fields `memory`, `kv_cache`, `context` and `concurrency`, or write `memory: manual`"
        )
    ]
    assert lines(entry(f"model: m\nmemory: manual\nargs: {{{flag}: 0.5}}")) == []


def test_what_defaults_say_of_memory_is_told_where_it_stands() -> None:
    given = "version: 1\ndefaults:\n  args: {gpu_memory_utilization: 0.5}\nengines:\n  a: {model: m}\n"
    (told,) = lines(given)
    assert told.startswith("f:3:10: defaults.args.gpu_memory_utilization: `gpu-memory-utilization` is set by ")
    assert lines(given.replace("{model: m}", "{model: m, memory: manual}")) == []


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ("context: 0", "context: expected a number of tokens, got the number 0; write it as 8192 or 32k"),
        ("context: 32.5k", "context: expected a number of tokens, got the text '32.5k'; write it as 8192 or 32k"),
        (
            "context: true",
            "context: expected a number of tokens, got `true`, which YAML reads as true; write it as 8192 or 32k",
        ),
        (
            "context: 1k\nargs: {max_model_len: 5}",
            "context: `context` and `max-model-len` in `args` are the same; remove one of the two",
        ),
        (
            "memory: 24GiB\nconcurrency: 2",
            (
                "concurrency: `concurrency` says what `memory: auto` shall hold, but `memory` is 24GiB; "
                "remove one of the two"
            ),
        ),
        (
            "memory: manual\nkv_cache: 2GiB",
            "kv_cache: `kv_cache` says what `memory: auto` shall hold, but `memory` is manual; remove one of the two",
        ),
        (
            "kv_cache: 2GiB\nconcurrency: 2",
            "kv_cache: `kv_cache` and `concurrency` both size the KV cache; remove one of the two",
        ),
        (
            "runtime: command\ncommand: serve\ncontext: 1k",
            "context: `context` means nothing to a command; say its `memory`",
        ),
        (
            "runtime: command\ncommand: serve\nmemory: manual",
            "memory: `memory: manual` is about vLLM's flags; write what the command takes, such as 24GiB",
        ),
    ],
)
def test_memory_is_asked_for_in_one_way(fields: str, told: str) -> None:
    (line,) = lines(entry(f"model: m\n{fields}"))
    assert line.split(": engines.chat.")[1] == told


def test_a_gpu_with_all_its_memory_is_for_one_alone() -> None:
    found = engine("model: m\nmemory: all")
    assert (found.spec.exclusive, found.record["exclusive"], str(found.spec.memory)) == (True, True, "all")
    assert not engine("model: m\nmemory: 100%").spec.exclusive


@pytest.mark.parametrize(("text", "tokens"), [("32k", 32768), ("8192", 8192), ("1m", 1 << 20), ("4K", 4096)])
def test_tokens(text: str, tokens: int) -> None:
    assert engine(f"model: m\ncontext: {text}").spec.context == tokens


@pytest.mark.parametrize("flag", ["ssl-password", "my-secret", "proxy-api-key", "auth-token", "access_token"])
def test_secrets_are_refused_on_the_command_line(flag: str) -> None:
    (told,) = lines(entry(f"model: m\nargs: {{{flag}: hunter2}}"))
    assert "would put a secret on the command line" in told
    assert "pass it through `env:`" in told
    assert "hunter2" not in told


@pytest.mark.parametrize("flag", ["max-model-len", "tokenizer", "max-num-seqs", "hosts-file", "por", "dpx", "modelled"])
def test_flags_that_only_resemble_ours_are_vllms(flag: str) -> None:
    assert engine(f"model: m\nargs: {{{flag}: 1}}").spec.args == {flag: 1}


def test_flags_are_kept_by_their_plain_names() -> None:
    assert engine("model: m\nargs: {--max_model_len: 4096, enforce_eager: true}").spec.args == {
        "max-model-len": 4096,
        "enforce-eager": True,
    }


@pytest.mark.parametrize(
    ("written", "environ", "value"),
    [
        ("${A}", {"A": "x"}, "x"),
        ("${A}", {"A": ""}, ""),
        ("p-${A}-s", {"A": "x"}, "p-x-s"),
        ("${A}${B}", {"A": "x", "B": "y"}, "xy"),
        ("${A:-d}", {}, "d"),
        ("${A:-d}", {"A": ""}, "d"),
        ("${A:-d}", {"A": "x"}, "x"),
        ("${A:-}", {}, ""),
        ("$$A", {"A": "x"}, "$A"),
        ("$${A}", {"A": "x"}, "${A}"),
        ("$A", {"A": "x"}, "$A"),
        ("${A}", {"A": "${B}", "B": "y"}, "${B}"),
    ],
)
def test_variables(written: str, environ: dict[str, str], value: str) -> None:
    assert engine(f"model: m\nenv: {{X: '{written}'}}", environ).spec.env == {"X": value}


def test_variables_give_numbers_too() -> None:
    spec = engine("model: m\nreplicas: ${N}\nport: ${P}\nmemory: ${M}", {"N": "3", "P": "8000", "M": "24GiB"}).spec
    assert (spec.replicas, spec.port, spec.memory) == (3, 8000, Memory("mib", 24576))


SECRET = "hunter2-the-secret"


def test_secrets_are_used_and_never_shown() -> None:
    text = entry(
        "model: ${S}/m\npython: /opt/${S}/python\nargs: {chat_template: '${S}', --list: [a, '${S}']}\n"
        "env: {TOKEN: '${S}', PLAIN: hunter2-the-secret}\nserved_model_name: ['${S}']\nenv_file: x.env"
    )
    wanted, faults = read(text, {"S": SECRET}, {"x.env": {"FROM_FILE": SECRET}})
    assert faults == []
    (found,) = wanted.engines
    assert found.spec.env["TOKEN"] == found.spec.args["chat-template"] == found.env["FROM_FILE"] == SECRET
    for shown in (repr(found), repr(wanted), repr(found.shown), json.dumps(found.record)):
        assert SECRET not in shown
    assert found.shown.env == {"TOKEN": "${S}", "PLAIN": HIDDEN}
    assert found.shown.model == "${S}/m"
    assert found.shown.args == {"chat-template": "${S}", "list": ["a", "${S}"]}
    assert set(found.secrets) == {
        *("model", "python", "args.chat-template", "args.list.1", "env.TOKEN", "env.PLAIN", "served_model_name.0"),
        "env_file.FROM_FILE",
    }


def test_a_command_from_the_environment_is_hidden_although_it_is_split_into_words() -> None:
    found = engine("runtime: command\ncommand: serve --key ${S}", {"S": f"{SECRET} --more"})
    assert found.spec.command == ("serve", "--key", SECRET, "--more")
    assert found.shown.command == ("serve --key ${S}",)
    assert SECRET not in repr(found)


@pytest.mark.parametrize("name", [name for name in EngineSpec.model_fields if name not in ("env", "args")])
@pytest.mark.parametrize("where", ["engine", "defaults"])
def test_faults_do_not_quote_what_came_from_the_environment(name: str, where: str) -> None:
    text = f"version: 1\nengines:\n  chat: {{model: m}}\ndefaults: {{{name}: '${{S}}'}}\n"
    if where == "engine":
        text = entry(("" if name == "model" else "model: m\n") + f"{name}: '${{S}}'")
    assert SECRET not in "\n".join(lines(text, {"S": f"-{SECRET} {{"}))


@pytest.mark.parametrize(
    "text",
    [
        "version: '${S}'\nengines: {}\n",
        "version: 1\nhost: '${S}'\nengines: {}\n",
        "version: 1\ndefaults: '${S}'\nengines: {}\n",
        "version: 1\nengines: '${S}'\n",
        "version: 1\nengines: {a: '${S}'}\n",
        "version: 1\nhost: {gpus: '${S}', exclude: '${S}', ports: '${S}', headroom: '${S}'}\nengines: {}\n",
        "version: 1\nhost: {gpus: [{name: a, memory: '${S}', count: '${S}'}]}\nengines: {}\n",
        "version: 1\nengines: {a: {model: m, args: '${S}', env: '${S}'}}\n",
        "version: 1\nengines: {a: {model: m, gpus: ['${S}', '${S}'], served_model_name: ['-${S}']}}\n",
    ],
)
def test_no_fault_anywhere_quotes_what_came_from_the_environment(text: str) -> None:
    told = "\n".join(lines(text, {"S": SECRET}))
    assert told
    assert SECRET not in told
    assert "${S} holds" in told


def test_a_missing_field_is_still_named_where_others_come_from_the_environment() -> None:
    (told,) = lines(entry("port: ${P}"), {"P": "8000"})
    assert "field `model` is missing" in told


def test_secret_marks_tell_a_change_and_nothing_else() -> None:
    marks = secret_marks({"env.A": SECRET}, "salt")
    assert marks == secret_marks({"env.A": SECRET}, "salt")
    assert marks != secret_marks({"env.A": SECRET + "!"}, "salt")
    assert marks != secret_marks({"env.A": SECRET}, "pepper"), "the same secret looks different in another record"
    assert SECRET not in str(marks)


def test_defaults_are_overridden_field_by_field_and_args_and_env_key_by_key() -> None:
    wanted = desired(
        "version: 1\n"
        "defaults:\n"
        "  {memory: 10GiB, args: {seed: 1, max_model_len: 512}, env: {A: '1', B: '2'}, served_model_name: [d]}\n"
        "engines:\n"
        "  a: {model: m}\n"
        "  b: {model: m, memory: 20GiB, args: {seed: 2}, env: {B: '3'}, served_model_name: [x]}\n"
    )
    a, b = (engine.spec for engine in wanted.engines)
    assert (a.memory, a.args, a.env) == (Memory("mib", 10240), {"seed": 1, "max-model-len": 512}, {"A": "1", "B": "2"})
    assert (b.memory, b.args, b.env) == (Memory("mib", 20480), {"seed": 2, "max-model-len": 512}, {"A": "1", "B": "3"})
    assert (a.served_model_name, b.served_model_name) == (("d",), ("x",))


def test_env_overrides_the_env_file() -> None:
    wanted, faults = read(
        entry("model: m\nenv_file: a.env\nenv: {A: own}"),
        {},
        {"a.env": {"A": "file", "B": "file"}, "b.env": {"A": "other"}},
    )
    assert faults == []
    assert wanted.engines[0].env == {"A": "own", "B": "file"}
    assert "file" not in repr(wanted.engines[0].record.values())


@pytest.mark.parametrize("where", ["defaults", "entry"])
def test_the_cache_of_vllm_on_the_cpu_is_not_set_in_an_env_file_but_by_hand(where: str) -> None:
    text = (
        "version: 1\ndefaults: {env_file: a.env}\nengines: {chat: {model: m, device: cpu}}\n"
        if where == "defaults"
        else "version: 1\nengines:\n  chat: {model: m, device: cpu, env_file: a.env}\n"
    )
    files = {"a.env": {"VLLM_CPU_KVCACHE_SPACE": "4"}}
    _, faults = read(text, {}, files)
    line, path = ("2:22", "defaults.env_file") if where == "defaults" else ("3:43", "engines.chat.env_file")
    (fault,) = faults
    what = "`VLLM_CPU_KVCACHE_SPACE` is set by sage-reconcile; use the field `kv_cache`, or write `memory: manual`"
    assert fault.text("f") == f"f:{line}: {path}: {what}"
    for other in ("memory: manual", "runtime: simulator", "device: cuda"):
        allowed = text.replace("device: cpu", other if "cuda" in other else f"device: cpu, {other}")
        assert read(allowed, {}, files)[1] == []


def test_env_files_are_named_with_the_field_that_names_them_first() -> None:
    text = (
        "version: 1\ndefaults: {env_file: d.env}\n"
        "engines: {a: {model: m}, b: {model: m, env_file: '${F}'}, c: {model: m}}\n"
    )
    assert env_file_names(source(text), {"F": "f.env"}) == {
        "d.env": ("defaults", "env_file"),
        "f.env": ("engines", "b", "env_file"),
    }


def test_the_record_is_json_and_holds_every_field() -> None:
    record = engine("model: m\nmemory: 24GiB\nargs: {a: {b: [1, null]}}").record
    assert json.loads(json.dumps(record)) == record
    assert set(record) == set(EngineSpec.model_fields)
    assert record["memory"] == "24GiB"


def test_the_record_of_an_entry_reads_as_that_entry_again() -> None:
    first = engine("model: m\nmemory: 30%\nstop_timeout: 1m30s\nargs: {seed: 1}\ngpus: [0, GPU-x]\nport: 8000")
    given = {name: value for name, value in first.record.items() if value is not None}
    assert EngineSpec.model_validate(given) == first.spec


def test_engines_are_told_apart_by_everything_but_what_must_not_show() -> None:
    hidden = {field.name for field in fields(Engine) if not field.repr}
    assert hidden == {"spec", "secrets", "env"}


def test_a_default_flag_is_overridden_however_it_is_spelled() -> None:
    wanted = desired(
        "version: 1\ndefaults: {args: {--max_model_len: 512, max-num-seqs: 8}}\n"
        "engines: {a: {model: m, args: {max-model-len: 1024, max_num_seqs: 9}}}\n"
    )
    assert wanted.engines[0].spec.args == {"max-model-len": 1024, "max-num-seqs": 9}


def test_a_plain_value_over_a_default_from_the_environment_is_shown_as_it_is() -> None:
    a, b = desired(
        "version: 1\ndefaults: {env: {T: '${S}'}, args: {x: '${S}', max_y: ['${S}']}}\n"
        "engines: {a: {model: m, env: {T: plain}, args: {x: plain, max-y: [1]}}, b: {model: m}}\n",
        {"S": SECRET},
    ).engines
    assert (a.shown.args, a.shown.env) == ({"x": "plain", "max-y": [1]}, {"T": HIDDEN})
    assert (b.shown.args, b.shown.env) == ({"x": "${S}", "max-y": ["${S}"]}, {"T": "${S}"})
    assert set(a.secrets) == {"env.T"}
    assert set(b.secrets) == {"env.T", "args.x", "args.max-y.0"}
    assert SECRET not in repr((a, b))


def test_every_bad_flag_and_variable_is_told_at_its_own_key() -> None:
    _, faults = read(
        """\
version: 1
engines:
  chat:
    model: m
    args: {port: 1, tp: 2, api-key: x, fine: 1}
    env: {VLLM_PORT: 1, FINE: 1, on-top: x}
"""
    )
    assert [(fault.line, fault.column, fault.where) for fault in faults] == [
        (5, 12, "engines.chat.args.port"),
        (5, 21, "engines.chat.args.tp"),
        (5, 28, "engines.chat.args.api-key"),
        (6, 11, "engines.chat.env.VLLM_PORT"),
        (6, 34, "engines.chat.env.on-top"),
    ]


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ("8xH100-80GB", [("H100-80GB", 81559, 8)]),
        ("'2xA100-80GB, 4xL4'", [("A100-80GB", 81920, 2), ("L4", 23034, 4)]),
        ("[8xh100-sxm, 4x24GiB]", [("H100-80GB", 81559, 8), ("24GiB", 24576, 4)]),
        ("[{name: NVIDIA H200, count: 2}]", [("H200", 143771, 2)]),
        ("[{name: h100, memory: 80GiB}]", [("h100", 81920, 1)]),
        ("[{name: Mine, memory: 8GiB, count: 3}]", [("Mine", 8192, 3)]),
        ("auto", []),
        ("none", []),
    ],
)
def test_gpus_are_declared_in_words_or_as_maps(gpus: str, expected: list[tuple[str, int, int]]) -> None:
    wanted = desired(f"version: 1\nhost: {{gpus: {gpus}}}\nengines: {{}}\n")
    assert [astuple(group) for group in wanted.host.declared] == expected


def test_what_declares_gpus_and_came_from_the_environment_is_not_quoted() -> None:
    for gpus in ("'${G}'", "['${G}']", "[{name: '${G}'}]"):
        _, faults = read(f"version: 1\nhost: {{gpus: {gpus}}}\nengines: {{}}\n", {"G": "4xsecret1"})
        assert len(faults) == 1
        assert "secret1" not in faults[0].text("f")
