"""What `pull` and `push` do with what they are given, as a library, against a hub on loopback."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neuroscope_vllm.core import artefacts
from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.errors import (
    ConfigError,
    DownloadError,
    LockError,
    NeuroscopeError,
    NoFileError,
    SAEError,
)
from neuroscope_vllm.core.labels import Label, LabelSet, load_labels
from neuroscope_vllm.core.sharing.card import render_card
from neuroscope_vllm.core.sharing.lock import Lock, LockedSAE, load_lock
from neuroscope_vllm.core.sharing.package import (
    Entry,
    LabelsEntry,
    Manifest,
    labels_from_parquet,
    labels_to_parquet,
)
from neuroscope_vllm.core.sharing.pull import fetch, resolve, sae_sources
from neuroscope_vllm.core.sharing.push import push
from tests.core.test_hub import params  # noqa: F401  (a fixture)
from tests.support.hf_hub import HubServer, hub  # noqa: F401  (a fixture)

REPO = "org/saes"
SAES = [f"hf://{REPO}/layer_20/width_16k/average_l0_{l0}" for l0 in (71, 120)]
DATASET = "alice/features"
WIDTH = 8


@pytest.fixture(autouse=True)
def home(hub: HubServer, params: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """Two SAEs on the hub, and alice, who has made something about each."""
    paths = [sae.removeprefix(f"hf://{REPO}/") for sae in SAES]
    hub.add_repo(REPO, {f"{path}/params.npz": params for path in paths})
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    for sae in SAES:
        keep(sae, "alice", ["a place"])
    return artefacts.data_dir()


def keep(sae: str, labeller: str, texts: Iterable[str], width: int = WIDTH) -> None:
    Calibration.empty(width).save(artefacts.home(sae) / "calibration.safetensors")
    made = [Label(index=n, text=text, labeller=labeller) for n, text in enumerate(texts)]
    LabelSet(labeller, made).save(artefacts.labels_file(sae, labeller))


def manifest(hub: HubServer) -> Manifest:  # noqa: F811
    import msgspec

    return msgspec.json.decode(
        hub.read(DATASET, "neuroscope.json", repo_type="dataset"), type=Manifest
    )


def test_a_second_push_adds_and_takes_nothing_away(hub: HubServer) -> None:  # noqa: F811
    push(DATASET, SAES[:1], license="mit")
    keep(SAES[0], "bob", ["b", "c"])
    push(DATASET, SAES[:1], labellers=["bob"])
    push(DATASET, SAES[1:])
    there = manifest(hub)
    assert there.license == "mit"
    assert {entry.sae: sorted(entry.labels) for entry in there.saes.values()} == {
        SAES[0]: ["alice", "bob"],
        SAES[1]: ["alice"],
    }
    _, files = hub.repos["dataset", DATASET].files("main")
    assert sum(path.endswith(".parquet") for path in files) == 3
    assert len(hub.repos["dataset", DATASET].commits) == 4  # one each, after the empty one


def test_pull_from_a_dataset_brings_all_that_it_is_about(
    hub: HubServer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    push(DATASET, SAES, private=True)
    monkeypatch.setenv("NEUROSCOPE_DATA", str(tmp_path / "fresh"))
    pulled = fetch(resolve(None, None, [], DATASET), locked=False)
    assert sorted(sae.name for sae in pulled.lock.saes) == sorted(SAES)
    assert pulled.kept == []
    for sae in SAES:
        assert artefacts.find_calibration(sae) in pulled.installed
        assert [path.name for path in artefacts.find_labels(sae)] == ["alice.jsonl"]
    pulled.lock.save(tmp_path / "a.lock")
    assert load_lock(tmp_path / "a.lock") == pulled.lock
    assert fetch(pulled.lock, locked=True).lock == pulled.lock


def test_what_may_not_be_pushed(hub: HubServer, tmp_path: Path) -> None:  # noqa: F811
    keep(SAES[0], "neuronpedia", ["theirs"])
    renamed = Label(index=0, text="x", labeller="Renamed", method="np_acts-logits-general")
    LabelSet("Renamed", [renamed]).save(artefacts.labels_file(SAES[0], "Renamed"))
    hub.add_repo("alice/other", {"data.csv": b""}, repo_type="dataset")
    hub.add_repo("alice/public", repo_type="dataset")
    for words, options, says in (
        (SAES[:1], {"labellers": ["neuronpedia"]}, "by neuronpedia are Neuronpedia.s and are not"),
        (SAES[:1], {"labellers": ["Renamed"]}, "by Renamed are Neuronpedia's and are not pushed"),
        (SAES[:1], {"labellers": ["nobody"]}, "no labels of 'nobody' .*: Renamed, alice, neuronp"),
        (SAES[:1], {}, "would be public without a licence"),
        ([str(tmp_path)], {}, "is on this machine only"),
        ([f"hf://{REPO}/layer_1"], {}, "is not an SAE"),
        (SAES[:1], {"repo": "alice/other", "license": "mit"}, "holds something else .data.csv."),
        (SAES[:1], {"repo": "alice/public", "private": True}, "exists and is public"),
    ):
        with pytest.raises((ConfigError, NoFileError), match=says):
            push(**{"repo": DATASET, "sources": words, **options})  # type: ignore[arg-type]
    keep(SAES[0], "alice", ["x"] * (WIDTH + 1))
    with pytest.raises(ConfigError, match=r"of feature 8 too, but SAE .* has 8"):
        push(DATASET, SAES[:1], license="mit")
    keep(SAES[0], "alice", ["x"], width=WIDTH + 1)
    with pytest.raises(ConfigError, match=r"is of 9 features, but SAE .* has 8"):
        push(DATASET, SAES[:1], license="mit")
    assert ("dataset", DATASET) not in hub.repos


def test_neuronpedias_labels_stay_whatever_their_name(
    hub: HubServer,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    keep(SAES[0], "Neuronpedia", ["theirs"])
    push(DATASET, SAES[:1], license="mit")
    assert [sorted(entry.labels) for entry in manifest(hub).saes.values()] == [["alice"]]
    assert "labels by Neuronpedia stay here" in caplog.text


def test_a_damaged_label_file_is_left_out_of_a_push_unless_it_is_named(
    hub: HubServer,  # noqa: F811
) -> None:
    artefacts.labels_file(SAES[0], "z").write_text('{"index": 1}\n')
    with pytest.raises(ConfigError, match=r"line 1 of .*z.jsonl is not a label"):
        push(DATASET, SAES[:1], labellers=["z"], license="mit")
    push(DATASET, SAES[:1], license="mit")
    assert [sorted(entry.labels) for entry in manifest(hub).saes.values()] == [["alice"]]


def bomb(size: int, *, lies: bool) -> bytes:
    """Labels in a few kB, whose text takes `size` bytes; the footer may say that it takes none."""
    buffer = io.BytesIO()
    table = pa.table({"index": [0], "text": ["a" * size], "labeller": ["alice"]})
    pq.write_table(table, buffer, compression="zstd", use_dictionary=False)
    content = buffer.getvalue()
    if lies:
        said = pq.read_metadata(buffer).row_group(0).column(1).total_uncompressed_size
        written = zigzag(said)
        padded = bytes([0x90, *[0x80] * (len(written) - 2), 0])  # 8, as long
        head, _, tail = content.rpartition(written)
        content = head + padded + tail
    return content


def zigzag(number: int) -> bytes:
    """A positive number as Thrift writes it."""
    number, out = number << 1, []
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


@pytest.mark.parametrize(
    ("content", "width", "says"),
    [
        (bomb(200_000_000, lies=False), WIDTH, "too large for 8 features"),  # told by the footer
        (bomb(3_000_000, lies=True), WIDTH, "have a text of absurd length"),
    ],
)
def test_a_small_file_that_unpacks_to_much_is_refused(
    tmp_path: Path, content: bytes, width: int, says: str
) -> None:
    assert len(content) < 20_000
    path = tmp_path / "labels.parquet"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        labels_from_parquet(path, "alice", width, tmp_path)


def test_a_text_that_is_repeated_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.parquet"
    rows = {"index": list(range(999)), "text": ["a" * 39_999] * 999, "labeller": ["alice"] * 999}
    path.write_bytes(parquet(**rows))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="too large for 999 features"):
        labels_from_parquet(path, "alice", 999, tmp_path)


def parquet(**columns: list[object]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


GOOD = {"index": [1], "text": ["a"], "labeller": ["alice"]}


@pytest.mark.parametrize(
    ("path", "content", "says"),
    [
        ("calibration.safetensors", b"\x80\x04garbage", "is not a safetensors file"),
        ("calibration.safetensors", Calibration.empty(9).to_bytes(), "is of 9 features, but SAE"),
        ("labels/alice.parquet", b"PAR1garbage", "are not labels in parquet"),
        ("labels/alice.parquet", parquet(index=[1], text=["a"]), "are not labels in parquet"),
        ("labels/alice.parquet", parquet(**GOOD | {"index": [8]}), "hold a label of feature 8 by"),
        ("labels/alice.parquet", parquet(**GOOD | {"index": [-1]}), "has index -1; indices start"),
        ("labels/alice.parquet", parquet(**GOOD | {"labeller": ["eve"]}), "feature 1 by 'eve'"),
        ("labels/alice.parquet", parquet(**GOOD | {"text": ["\x07 "]}), "has an empty text"),
        ("labels/alice.parquet", parquet(**GOOD | {"text": [b"\xff"]}), "are not labels|no text"),
        ("labels/alice.parquet", parquet(**GOOD | {"text": ["x" * 99_999]}), "of absurd length"),
        ("labels/alice.parquet", parquet(**{k: v * 9 for k, v in GOOD.items()}), "are 9 of an SAE"),
        ("labels/alice.parquet", parquet(index=[], text=[], labeller=[]), "labels|no text"),
    ],
)
def test_a_spoilt_dataset_is_refused_and_leaves_nothing(
    hub: HubServer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    path: str,
    content: bytes,
    says: str,
) -> None:
    push(DATASET, SAES[:1], license="mit")
    spoilt = f"{artefacts.home(SAES[0]).name}/{path}"
    hub.commit(DATASET, {spoilt: content}, repo_type="dataset")
    monkeypatch.setenv("NEUROSCOPE_DATA", str(tmp_path / "fresh"))
    with pytest.raises(ConfigError, match=says):
        fetch(resolve(None, None, [], DATASET), locked=False)
    assert not (tmp_path / "fresh").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"labels": {"../../evil": {"count": 1}}}, "labeller '../../evil' can not name a file"),
        ({"labels": {"gone": {"count": 1}}}, "has no file .*/labels/gone.parquet"),
        ({"sae": "/etc"}, "is not a hub address"),
        ({"sae": "hf://org/saes/../x"}, "leads out of its repository"),
        ({"sae": SAES[1]}, "has nothing about"),
        ({"commit": "f" * 40}, "has no revision 'ffff"),
        ({"width": "wide"}, "cannot be read .Expected `int`"),
    ],
)
def test_a_manifest_is_not_trusted(
    hub: HubServer,  # noqa: F811
    changes: dict[str, object],
    says: str,
) -> None:
    push(DATASET, SAES[:1], license="mit")
    there = json.loads(hub.read(DATASET, "neuroscope.json", repo_type="dataset"))
    for entry in there["saes"].values():
        entry.update(changes)
    for content in (json.dumps(there).encode(),):
        hub.commit(DATASET, {"neuroscope.json": content}, repo_type="dataset")
        with pytest.raises(NeuroscopeError, match=says):
            fetch(resolve(None, None, [], DATASET), locked=False)


def test_a_dataset_of_others_and_a_version_of_tomorrow(hub: HubServer) -> None:  # noqa: F811
    hub.add_repo(DATASET, {"data.csv": b""}, repo_type="dataset")
    with pytest.raises(NoFileError, match="was not written by `neuroscope push`"):
        resolve(None, None, [], DATASET)
    hub.commit(DATASET, {"neuroscope.json": b'{"version": 2}'}, repo_type="dataset")
    with pytest.raises(ConfigError, match="is of version 2, and this neuroscope reads version 1"):
        resolve(None, None, [], DATASET)


def test_what_the_hub_does_not_take_is_said() -> None:
    with pytest.raises(DownloadError, match=r'does not take .*"license" must be one of'):
        push(DATASET, SAES[:1], license="nonsense")


def test_a_dataset_that_is_about_some_of_the_saes(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    push(DATASET, SAES[:1], license="mit")
    pulled = fetch(resolve(None, None, SAES, DATASET), locked=False)
    assert len(pulled.saes) == 2
    assert f"has nothing about {SAES[1]}" in caplog.text
    with pytest.raises(ConfigError, match=f"nothing about {SAES[1]}; it is about {SAES[0]}"):
        fetch(resolve(None, None, SAES[1:], DATASET), locked=False)


@pytest.mark.parametrize("name", ["gpt2", "/models/gemma", "a/b/c", "../b"])
def test_what_cannot_be_a_repository(name: str) -> None:
    with pytest.raises(ConfigError, match="write org/repo"):
        resolve(name, None, [], None)
    with pytest.raises(ConfigError, match="write org/repo"):
        resolve(None, None, [], name)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"version": 7, "new": 1}', "is of version 7, and this neuroscope reads version 1"),
        ('{"saes": [{"type": "model", "repo": "a/b", "commit": "main", "path": ""}]}', "damaged"),
        ('{"saes": [{"type": "model", "repo": "../b", "commit": "C", "path": ""}]}', "damaged"),
        ('{"unknown": 1}', "is damaged"),
    ],
)
def test_a_lock_that_is_damaged(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "neuroscope.lock"
    path.write_text(content.replace('"C"', f'"{"a" * 40}"'))
    with pytest.raises(LockError, match=says):
        load_lock(path)


def test_a_lock_does_not_lead_out(hub: HubServer) -> None:  # noqa: F811
    commit = hub.repos["model", REPO].refs["main"]
    lock = Lock(saes=[LockedSAE(repo=REPO, commit=commit, path="../../etc")])
    with pytest.raises(SAEError, match="leads out"):
        fetch(lock, locked=True)


def test_gemma_scope_is_one_sae_for_each_layer() -> None:
    found = sae_sources(["gemma-scope"], [20, 12], "google/gemma-2-2b")
    assert [source.split("/")[4] for source in found] == ["layer_20", "layer_12"]
    with pytest.raises(ConfigError, match="give MODEL and --layer"):
        sae_sources(["gemma-scope"], [], "google/gemma-2-2b")
    with pytest.raises(ConfigError, match="leave --layer out"):
        sae_sources([SAES[0]], [20], None)


def test_the_card_shows_what_others_wrote_as_text() -> None:
    labels = {"x|y": LabelsEntry(count=1, methods=["<b>|\n---"], models=["[a](b)"])}
    entry = Entry(sae=SAES[0], commit="c", width=8, labels=labels, model="`m`")
    with pytest.raises(ConfigError, match="can not name a file"):
        render_card("a/b", Manifest(saes={"k": entry}))
    card = render_card(
        "a/b", Manifest(saes={"k": Entry(sae=SAES[0], commit="c", width=8, model="<i>")})
    )
    assert "\\<i\\>" in card


def test_the_same_labels_are_the_same_bytes() -> None:
    labels = load_labels(artefacts.labels_file(SAES[0], "alice"))
    assert labels_to_parquet(labels) == labels_to_parquet(labels)


def test_scores_travel_with_labels(tmp_path: Path) -> None:
    scored = Label(
        3,
        "dogs",
        "alice",
        0.7,
        detection=0.8,
        fuzzing=0.6,
        scorer="gpt",
        scored_on="2026-02-03",
        scoring="detection@1:2",
        positives=20,
        negatives=19,
    )
    (tmp_path / "x.parquet").write_bytes(labels_to_parquet(LabelSet("alice", [scored])))
    assert list(labels_from_parquet(tmp_path / "x.parquet", "alice", 9, tmp_path)) == [scored]


def test_two_pushes_at_once_lose_nothing(hub: HubServer) -> None:  # noqa: F811
    push(DATASET, SAES[:1], license="mit")
    hub.before_commit = lambda: hub.commit(DATASET, {"x": b""}, repo_type="dataset")
    with pytest.raises(DownloadError, match="A commit has happened since"):
        push(DATASET, SAES[1:])
    assert list(manifest(hub).saes) == [artefacts.home(SAES[0]).name]
