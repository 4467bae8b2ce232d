"""Pre-tokenized shards: right codes, the raw order, the same bytes however they were made."""

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from multimodal_dlm.datasets import MixtureReader, ShardReader, open_manifest
from multimodal_dlm.datasets.manifest import write_dataset_manifest
from multimodal_dlm.datasets.row_groups import IDS, Codebooks, pack_group, unpack_group
from multimodal_dlm.datasets.row_reading import RowReader, open_reader
from multimodal_dlm.datasets.tokenize_engines import tokenize_manifest, tokenize_source
from multimodal_dlm.datasets.tokenizing import TokenizerFolders
from multimodal_dlm.datasets.validation import validate_manifest
from multimodal_dlm.datasets.writing import write_shards
from multimodal_dlm.errors import ConfigError, DataError
from multimodal_dlm.tokenizers.image import ImageTokenizer, pixels_from_images
from multimodal_dlm.tokenizers.text import encode_text, train_text_tokenizer
from tests.conftest import REPOSITORY
from tests.datasets.toy import SIZES, toy_mixture, toy_sample, write_toy


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The toy mixture, two tiny tokenizers, and the mixture pre-tokenized in `made`."""
    folder = tmp_path_factory.mktemp("tokenized")
    toy_mixture(folder)
    texts = [text for n in range(25) for text in toy_sample("shapes", n).record.captions]
    train_text_tokenizer(texts, vocab_size=280).save_pretrained(folder / "text")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = ImageTokenizer(
            image_size=8, channels=(8, 8), encoder_layers=(1, 1), decoder_layers=(1, 1)
        )
    image.mark_released()
    image.save_pretrained(folder / "image")
    tokenize_manifest(folder / "mixture.yaml", folder / "made", folders(folder))
    return folder


def folders(root: Path) -> TokenizerFolders:
    return TokenizerFolders(str(root / "text"), str(root / "image"))


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_codes_are_those_of_the_tokenizers(root):
    raw, made = open_manifest(root / "mixture.yaml"), open_manifest(root / "made" / "mixture.yaml")
    loaded = folders(root).load()
    for name in SIZES:
        samples = ShardReader(raw.sources[name].splits["train"])
        rows = open_reader(made.sources[name], "train")
        assert isinstance(rows, RowReader)
        assert len(rows) == len(samples) == SIZES[name]
        for index, sample in enumerate(samples):
            row = rows.row(index)
            assert row.record == sample.record == rows.record(index) == rows[index].record
            for text in (*sample.record.captions, "which?", "is it?", "yes"):
                assert row.texts[text].tolist() == encode_text(loaded.text, text)
            if name == "words":
                assert row.codes is None
                continue
            codes = loaded.image.encode(pixels_from_images([sample.image]))
            assert row.codes is not None
            assert row.codes[0].dtype == np.uint16
            assert np.array_equal(row.codes[0], codes[0][0].numpy())


def test_the_order_is_that_of_the_raw_shards(root):
    raw, made = open_manifest(root / "mixture.yaml"), open_manifest(root / "made" / "mixture.yaml")
    assert raw.fingerprint == made.fingerprint
    readers = [MixtureReader(manifest, seed=5, batch_size=4) for manifest in (raw, made)]
    assert readers[0].state_at(7) == readers[1].state_at(7)
    for number in range(2 * readers[0].batches_per_epoch):
        assert readers[0].batch(number) == readers[1].batch(number)


def test_a_changed_raw_shard_changes_the_identity(root):
    made = open_manifest(root / "made" / "mixture.yaml")
    source = made.sources["shapes"]
    first, *rest = source.splits["train"]
    assert first.origin is not None
    other = dataclasses.replace(first, origin=dataclasses.replace(first.origin, sha256="0" * 64))
    changed = dataclasses.replace(source, splits={"train": (other, *rest)})
    sources = {**made.sources, "shapes": changed}
    assert dataclasses.replace(made, sources=sources).fingerprint != made.fingerprint
    with pytest.raises(DataError, match="made from the raw shard that the manifest names"):
        RowReader(changed, "train").record(0)


def test_a_member_is_a_plain_array_and_json(root):
    shard = open_manifest(root / "made" / "shapes.yaml").sources["shapes"].splits["train"][0]
    with tarfile.open(shard.path) as tar:
        names = tar.getnames()
        ids = np.load(io.BytesIO(tar.extractfile(names[0]).read()), allow_pickle=False)
        content = json.loads(tar.extractfile(names[1]).read())
    assert names == [f"rows-0000000.{IDS}", "rows-0000000.json"]
    assert (ids.dtype, ids.ndim) == (np.uint16, 1)
    assert sum(sum(row["lengths"]) for row in content["rows"]) == len(ids)
    assert len(content["rows"]) == shard.count == 4


SCRIPT = """
import sys
from multimodal_dlm.datasets.tokenize_engines import tokenize_manifest
from multimodal_dlm.datasets.tokenizing import TokenizerFolders

if __name__ == "__main__":
    root, output = sys.argv[1:]
    tokenizers = TokenizerFolders(root + "/text", root + "/image")
    report = lambda source, count, total: print(count, flush=True) or sys.stdin.readline()
    tokenize_manifest(root + "/mixture.yaml", output, tokenizers, workers=2, progress=report)
"""


def test_killed_and_run_again_the_bytes_are_the_same(root, tmp_path):
    """SIGKILL while two processes work: they end too, and one process finishes what is left."""
    psutil = pytest.importorskip("psutil")
    whole, output = contents(root / "made"), tmp_path / "made"
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(root), str(output)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment) as running:
        assert running.stdout.readline().strip() == b"4"
        workers = psutil.Process(running.pid).children(recursive=True)
        running.kill()
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=20)[1]
    # What a worker was writing when it was killed lies beside them under a name of its own.
    kept = {name: sha for name, sha in contents(output).items() if not name.endswith(".partial")}
    assert 1 <= len(kept) < len(whole)
    assert kept.items() <= whole.items()
    (output / "shapes" / "shapes-train-000001.tar.99.partial").write_bytes(b"half")
    cut = output / "shapes" / "shapes-train-000002.tar"
    cut.write_bytes((root / "made" / "shapes" / cut.name).read_bytes()[:1000])
    tokenize_manifest(root / "mixture.yaml", output, folders(root))
    assert contents(output) == whole


def test_groups_split_a_large_shard(root, tmp_path, monkeypatch):
    monkeypatch.setattr("multimodal_dlm.datasets.tokenize_engines.MIN_GROUP_ROWS", 1)
    raw = open_manifest(root / "mixture.yaml").sources["shapes"]
    made = tokenize_source(raw, tmp_path, folders(root), group_rows=3)
    with tarfile.open(made.splits["train"][0].path) as tar:
        assert len(tar.getnames()) == 4
    keys = [RowReader(made, "train").record(i).key for i in range(SIZES["shapes"])]
    assert keys == [sample.key for sample in ShardReader(raw.splits["train"])]


def test_validation_finds_what_is_wrong_with_a_shard(root, tmp_path):
    path = tokenize_manifest(root / "mixture.yaml", tmp_path, folders(root))
    assert validate_manifest(open_manifest(path)).is_valid
    shard = tmp_path / "shapes" / "shapes-train-000003.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    found = validate_manifest(open_manifest(path))
    assert found.counts == {"digest": 1, "row_group": 1}
    assert found.num_good == sum(SIZES.values()) - 4
    assert "the SHA-256 of the ids must be" in found.findings[1].message


BOOKS = Codebooks(text="t", text_size=300, image="i", image_sizes=(64, 64), grid=(1, 2))


def packed(**changes) -> dict[str, bytes]:
    """A group of one row, with parts of its json exchanged."""
    record = dataclasses.replace(toy_sample("shapes", 1).record, captions=("a",), qa=())
    codes = (np.array([[1, 2]]), np.array([[3, 63]]))
    members = pack_group([record], [codes], [[[7, 8, 299]]], BOOKS, "raw")
    content = json.loads(members["json"])
    for name, value in changes.items():
        content[name] = value(content[name]) if callable(value) else value
    return {**members, "json": json.dumps(content).encode()}


def with_ids(ids: np.ndarray, **changes) -> dict[str, bytes]:
    buffer = io.BytesIO()
    np.save(buffer, ids, allow_pickle=True)
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    return {**packed(ids_sha256=digest, **changes), IDS: buffer.getvalue()}


def test_a_group_comes_back_as_it_was():
    (row,) = unpack_group(packed(), "here").rows()
    assert row.codes is not None
    assert [level.tolist() for level in row.codes] == [[[1, 2]], [[3, 63]]]
    assert row.texts["a"].tolist() == [7, 8, 299]
    large = dataclasses.replace(BOOKS, text_size=70000)
    members = pack_group([row.record], [row.codes], [[[69999]]], large, "raw")
    (again,) = unpack_group(members, "here").rows()
    assert again.texts["a"].tolist() == [69999]
    assert again.texts["a"].dtype == np.uint32


def lengths(*values: int):
    return lambda rows: [{**rows[0], "lengths": list(values)}]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (lambda: packed(format="x/2"), "must be a group of rows written by"),
        (lambda: {**packed(), "json": b"[" * 10**6}, "RecursionError"),
        (lambda: {**packed(), IDS: b"\x93NUMPY\x01\x00"}, "must be a group of rows"),
        (lambda: with_ids(np.array([object()] * 7)), "Object arrays cannot be loaded"),
        (lambda: with_ids(np.zeros((7, 1), np.uint16)), "one flat uint16 array; got uint16"),
        (lambda: with_ids(np.zeros(7, np.int64)), "one flat uint16 array; got int64"),
        (lambda: packed(ids_sha256="0"), "the SHA-256 of the ids must be 0"),
        (lambda: packed(rows=[]), "1 to 4096 rows; got 0"),
        (lambda: packed(rows=lengths(2, 2, 4)), "the lengths must add up to the ids; got 8 and 7"),
        (lambda: packed(rows=lengths(2, 3, 2)), "picture codes or none, then texts"),
        (lambda: packed(rows=lengths(2, 2, -1)), "picture codes or none, then texts"),
        (lambda: packed(rows=lengths()), "picture codes or none, then texts"),
        (lambda: packed(rows=lengths(2)), "the lengths must add up to the ids; got 2 and 7"),
        (lambda: packed(rows=lengths(2, 2, 10**30)), "picture codes or none, then texts"),
        (lambda: packed(rows=lengths(2, 2, float("inf"))), "OverflowError"),
        (lambda: with_ids(np.array([1, 2, 3, 64, 7, 8, 9], "<u2")), "in its codebook; got 64"),
        (lambda: with_ids(np.array([1, 2, 3, 4, 7, 8, 300], "<u2")), "in its codebook; got 300"),
        (lambda: packed(codebooks={"text": "t"}), "must name fingerprints and sizes"),
    ],
)
def test_a_hostile_group_is_a_sentence(members, message):
    with pytest.raises(DataError, match=rf"(?s)here.*{message}"):
        unpack_group(members(), "here")


def test_wrong_options_are_sentences(root, tmp_path):
    raw = open_manifest(root / "mixture.yaml").sources["shapes"]
    made = open_manifest(root / "made" / "shapes.yaml").sources["shapes"]
    pair = folders(root)
    for options, message in (
        ({"engine": "rya"}, "Unknown engine `rya`. Did you mean `ray`"),
        ({"group_rows": 100}, r"`group_rows` must lie in 256\.\.4096; got 100"),
        ({"workers": 0}, "`workers` must be at least 1; got 0"),
        ({"splits": ["tran"]}, "Unknown split `tran`. Did you mean `train`"),
    ):
        with pytest.raises(ConfigError, match=message):
            tokenize_source(raw, tmp_path, pair, **options)
    with pytest.raises(DataError, match="pre-tokenized already. Give its raw manifest"):
        tokenize_source(made, tmp_path, pair)


@pytest.mark.parametrize("manifest", ["shapes.yaml", "mixture.yaml"])
@pytest.mark.parametrize("is_linked", [False, True])
def test_raw_files_are_never_written_over(root, tmp_path, manifest, is_linked):
    """The data root as `output`, by its name or through a link."""
    raw = tmp_path / "data"
    toy_mixture(raw)
    before, output = contents(raw), raw
    if is_linked:
        output = tmp_path / "link"
        output.symlink_to(raw)
    with pytest.raises(DataError, match="lie apart from the raw files; .* Give another `output`"):
        tokenize_manifest(raw / manifest, output, folders(root))
    source = open_manifest(raw / "shapes.yaml").sources["shapes"]
    with pytest.raises(DataError, match="shapes-train-000000.tar would be written over"):
        tokenize_source(source, output / "shapes", folders(root))
    apart = tmp_path / "apart"
    apart.mkdir()
    (apart / manifest).symlink_to(raw / manifest)  # Only this manifest would be written over.
    with pytest.raises(DataError, match=f"{manifest} would be written over"):
        tokenize_manifest(raw / manifest, apart, folders(root))
    assert contents(raw) == before
    assert [path.name for path in apart.iterdir()] == [manifest]


def test_tokenizers_are_those_given_or_of_a_pipeline_or_of_the_working_directory(
    root, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text, image = str(root / "text"), str(root / "image")
    assert TokenizerFolders.find(text, image) == folders(root)
    for given, there in (((None, image), "text"), ((text, "none"), "image")):
        with pytest.raises(ConfigError, match=rf"The {there} tokenizer must be a folder; there is"):
            TokenizerFolders.find(*given)
    for name in ("pipe/tokenizer", "tokenizers/text", "tokenizers/image"):
        (tmp_path / name).mkdir(parents=True)
    expected = TokenizerFolders("tokenizers/text", "tokenizers/image")
    assert TokenizerFolders.find() == TokenizerFolders.find(pipeline="elsewhere") == expected
    assert TokenizerFolders.find(pipeline="pipe").text == "pipe/tokenizer"
    assert TokenizerFolders.find(text, pipeline="pipe").text == text


def test_pictures_of_another_size_are_named(root, tmp_path):
    image = ImageTokenizer(image_size=16, channels=(8, 8))
    image.save_pretrained(tmp_path / "image")
    pair = TokenizerFolders(str(root / "text"), str(tmp_path / "image"))
    raw = open_manifest(root / "mixture.yaml").sources["shapes"]
    with pytest.raises(DataError, match="key shapes-000: .* 16 x 16; got 8 x 8"):
        tokenize_source(raw, tmp_path / "made", pair)


def test_readers_of_the_wrong_kind_say_so(root):
    made = open_manifest(root / "made" / "shapes.yaml").sources["shapes"]
    raw = open_manifest(root / "shapes.yaml").sources["shapes"]
    with pytest.raises(DataError, match="must hold samples; got a pre-tokenized one, without pic"):
        ShardReader(made.splits["train"])[0]
    swapped = dataclasses.replace(made, splits=raw.splits)
    with pytest.raises(DataError, match="must hold row groups; got a raw one"):
        RowReader(swapped, "train").record(0)


def test_ray_writes_the_same_bytes(root, tmp_path):
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    raw = open_manifest(root / "mixture.yaml").sources["shapes"]
    tokenize_source(raw, tmp_path / "shapes", folders(root), engine="ray", workers=2)
    assert not ray.is_initialized()
    made = {name: digest for name, digest in contents(root / "made").items() if "shapes/" in name}
    assert contents(tmp_path) == made


def test_unusable_samples_keep_their_rows_and_are_skipped_as_in_the_raw_shards(root, tmp_path):
    samples = [toy_sample("shapes", number) for number in range(SIZES["shapes"])]
    samples[5] = dataclasses.replace(samples[5], image_bytes=samples[5].image_bytes[:45])
    path = write_toy(tmp_path, "shapes")
    content = yaml.safe_load(path.read_text())
    shards = write_shards(samples, tmp_path / "shapes", "shapes-train", 4)
    write_dataset_manifest(path, content, {"train": shards}, "spoiled")
    raw = open_manifest(path)
    source, loaded = raw.sources["shapes"], folders(root).load()
    with pytest.raises(DataError, match="shapes-005"):
        tokenize_source(source, tmp_path / "strict", loaded)
    made = tokenize_source(source, tmp_path / "made", loaded, may_skip=True)
    tokenized = dataclasses.replace(raw, sources={"shapes": made})
    readers = [
        MixtureReader(manifest, batch_size=5, max_skipped=1) for manifest in (raw, tokenized)
    ]
    for number in range(5):
        first, second = (reader.batch(number) for reader in readers)
        assert first == second
    assert readers[1].selections["shapes"].skipped == {5: "picture"}
    with pytest.raises(DataError, match=r"unusable \(`picture`\) and was skipped"):
        readers[1].readers["shapes"].record(5)
    strict = MixtureReader(tokenized, batch_size=25)
    with pytest.raises(DataError, match="max_skipped"):
        strict.batch(0)
