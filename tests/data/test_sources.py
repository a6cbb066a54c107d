"""Sources of pictures: positions, labels and captions of each kind, and hostile or broken files."""

import io
import json
import pickle
import tarfile
import zipfile

import numpy
import pytest
import torch
from PIL import Image

from flowmap.data import IMAGE_SOURCES
from flowmap.data.images import folder as folder_module
from flowmap.data.images.edm2_zip import EDM2Images, EDM2Latents, read_array
from flowmap.data.images.folder import FolderImages
from flowmap.data.images.huggingface import HuggingFaceImages
from flowmap.data.images.webdataset import WebDatasetImages


def png(value, size=(6, 6), mode="RGB"):
    stream = io.BytesIO()
    Image.new(mode, size, (value, 0, 255 - value) if mode == "RGB" else value).save(stream, "PNG")
    return stream.getvalue()


def npy(array):
    stream = io.BytesIO()
    numpy.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def zipped(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return str(path)


def tarred(path, entries):
    with tarfile.open(path, "w") as archive:
        for name, content in entries:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


@pytest.fixture
def pictures(tmp_path):
    """Five pictures at values 0, 10, ... 40 in two class folders, captions for some."""
    root = tmp_path / "pictures"
    for i, place in enumerate(("b/0.png", "a/1.png", "a/2.png", "b/3.png", "a/4.png")):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(png(10 * i))
    (root / "a/1.txt").write_text("one\n")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "b/0.png", "text": "nought"}) + "\n\n")
    return root


def told(items):
    return [
        (item.key, item.label, item.caption, None if item.image is None else int(item.image[0, 0, 0])) for item in items
    ]


def check_positions(source):
    """Any range gives what the whole gives there, twice."""
    whole = list(source.items())
    for start, stop in ((0, 2), (3, 4), (1, None), (4, 99), (7, 9), (2, 2), (0, 2)):
        assert told(source.items(start, stop)) == told(whole[start:stop])
    assert source.length() in (None, len(whole))
    assert json.loads(json.dumps(source.identity()))["kind"] == source.kind and IMAGE_SOURCES[source.kind] is type(
        source
    )


def test_folder_sorts_labels_and_captions(pictures):
    source = FolderImages(root=str(pictures), size=4)
    assert told(source.items()) == [
        ("a/1.png", 0, "one", 10), ("a/2.png", 0, None, 20), ("a/4.png", 0, None, 40), ("b/0.png", 1, "nought", 0),
        ("b/3.png", 1, None, 30)
    ]  # fmt: skip
    assert (source.num_classes(), source.class_names()) == (2, ["a", "b"])
    assert next(source.items()).image.shape == (3, 4, 4) and next(source.items()).image.dtype == torch.uint8
    check_positions(source)


def test_folder_without_classes(pictures):
    (pictures / "beside.png").write_bytes(png(50))
    source = FolderImages(root=str(pictures), classes=False)
    assert source.num_classes() is None and [item.label for item in source.items()] == [None] * 6
    assert "beside the class folders" in [item.problem for item in FolderImages(root=str(pictures)).items()][-1]


def test_problems_keep_their_positions(pictures, monkeypatch):
    (pictures / "a/11.png").write_bytes(b"no picture")
    (pictures / "a/12.png").write_bytes(png(7, (40, 40)))
    (pictures / "a/13.png").write_bytes(png(7, mode="L"))
    (pictures / "a/14.png").write_bytes(png(7, mode="I;16"))
    (pictures / "a/13.txt").write_bytes(b"\xff\xfe")
    (pictures / "a/15.png").write_bytes(png(7, mode="L"))
    (pictures / "a/16.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    monkeypatch.setattr(folder_module, "MAX_PIXELS", 1000)
    found = {item.key: item for item in FolderImages(root=str(pictures)).items()}
    assert len(found) == 11 and "cannot identify" in found["a/16.png"].problem
    assert "cannot be read" in found["a/11.png"].problem and found["a/12.png"].problem == "has 40 x 40 pixels"
    assert "caption" in found["a/13.png"].problem and "deeper than 8 bits" in found["a/14.png"].problem
    assert found["a/15.png"].grey and not found["a/1.png"].grey


def test_the_fingerprint_knows_another_file(pictures):
    before = FolderImages(root=str(pictures)).fingerprint()
    assert before == FolderImages(root=str(pictures)).fingerprint()
    (pictures / "a/0.png").write_bytes(png(1))
    assert before != FolderImages(root=str(pictures)).fingerprint()


def test_metadata_that_is_none_is_named(pictures):
    (pictures / "metadata.jsonl").write_text('{"file_name": "a/1.png", "label": 3}\n')
    assert next(FolderImages(root=str(pictures)).items()).caption == "one"  # no text there: the .txt
    for line in ('{"text": "a"}', "[1]", "7", "{", "[" * 100_000):
        (pictures / "metadata.jsonl").write_text(f"\n{line}\n")
        with pytest.raises(ValueError, match="line 2"):
            next(FolderImages(root=str(pictures)).items())
        assert next(FolderImages(root=str(pictures), captions=False).items()).caption is None
    with pytest.raises(ValueError, match="no such folder"):
        FolderImages(root="nowhere").length()


@pytest.fixture
def saved(tmp_path):
    """A data set that save_to_disk wrote: five pictures, classes, captions, one picture broken."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "kind": datasets.ClassLabel(names=["x", "y", "z"]),
            "words": datasets.List(datasets.Value("string")),
        }
    )
    cells = [{"bytes": png(10 * i), "path": None} for i in range(4)] + [{"bytes": b"broken", "path": None}]
    rows = {"img": cells, "kind": [0, 1, 2, -1, 1], "words": [["a", "b"], [], ["c"], ["d"], ["e"]]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "parquet" / "train.parquet")
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("where", ["saved", "parquet"])
def test_huggingface(saved, where, streaming, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(saved / "cache"))
    settings = dict(path=str(saved / where), image="img", label="kind", caption="words", size=4, streaming=streaming)
    source = HuggingFaceImages(**settings)
    assert [(item.label, item.caption) for item in source.items()] == [
        (0, "a"),
        (1, None),
        (2, "c"),
        (None, "d"),
        (1, "e"),
    ]
    assert "cannot be read" in list(source.items())[4].problem
    assert source.class_names() == ["x", "y", "z"] and source.num_classes() == 3
    assert source.fingerprint() == HuggingFaceImages(**settings).fingerprint()
    check_positions(source)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"image": "nope"}, "'nope' is no column"),
        ({"path": "/nowhere/x"}, "/nowhere/x"),
        ({"caption": "kind"}, "no column"),
    ],
)
def test_huggingface_mistakes(saved, settings, says):
    if settings.get("caption"):
        item = next(HuggingFaceImages(**({"path": str(saved / "saved"), "image": "img"} | settings)).items())
        assert item.problem == "its caption is '0', not a text"
        return
    with pytest.raises(ValueError, match=says):
        HuggingFaceImages(**({"path": str(saved / "saved")} | settings)).length()


def test_an_address_in_a_data_set_is_not_fetched(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    import pyarrow.parquet

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    cells = [
        {"bytes": None, "path": "https://example.invalid/a.png"},
        {"bytes": None, "path": "/nowhere.png"},
        {"bytes": None, "path": None},
        None,
    ]
    (tmp_path / "d").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "d" / "train.parquet")
    for streaming in (False, True):
        found = list(HuggingFaceImages(path=str(tmp_path / "d"), streaming=streaming).items())
        assert len(found) == 4 and all("holds no picture" in item.problem for item in found)


def test_edm2_zip_of_pictures(tmp_path):
    names = [f"00000/img{i:08d}.png" for i in range(5)]
    entries = {name: png(10 * i) for i, name in reversed(list(enumerate(names)))}
    path = zipped(
        tmp_path / "p.zip",
        entries | {"dataset.json": json.dumps({"labels": [[name, i % 3] for i, name in enumerate(names)]})},
    )
    source = EDM2Images(path=path, size=4)
    assert (
        told(source.items()) == [(name, i % 3, None, 10 * i) for i, name in enumerate(names)]
        and source.num_classes() == 3
    )
    check_positions(source)
    with pytest.raises(ValueError, match="holds no latents"):
        EDM2Latents(path=path).build()


def test_a_hostile_zip(tmp_path, monkeypatch):
    monkeypatch.setattr("flowmap.data.images.edm2_zip.Archive.read.__defaults__", (50_000,))
    entries = {
        "../../up.png": png(1),
        "/root.png": png(2),
        "big.png": png(3) + bytes(60_000),
        "good.png": png(4),
        "notes.txt": b"x",
    }
    found = {item.key: item for item in EDM2Images(path=zipped(tmp_path / "h.zip", entries)).items()}
    assert len(found) == 4 and found["good.png"].problem is None
    assert (
        "points out" in found["../../up.png"].problem
        and "points out" in found["/root.png"].problem
        and "bytes" in found["big.png"].problem
    )
    for content in (b'{"labels": [["good.png", "x"]]}', b"[" * 100_000, b'{"labels": [["good.png", 99999999999]]}'):
        with pytest.raises(ValueError, match="dataset.json"):
            EDM2Images(path=zipped(tmp_path / "l.zip", {"good.png": png(4), "dataset.json": content})).length()
    (tmp_path / "torn.zip").write_bytes((tmp_path / "h.zip").read_bytes()[:-30])
    with pytest.raises(ValueError, match="not a whole zip"):
        EDM2Images(path=str(tmp_path / "torn.zip")).length()


class Bad:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_arrays_are_read_as_data():
    array = numpy.arange(24, dtype=numpy.float64).reshape(2, 3, 4)
    for one in (array, numpy.asfortranarray(array), array.astype(numpy.float16)):
        assert numpy.array_equal(read_array(npy(one)), array)
    header = npy(array)
    huge = header.replace(b"(2, 3, 4), }", b"(2, 3, 4000000000), }", 1)
    for content, says in (
        (npy(numpy.array([Bad()])), "pickled"),
        (pickle.dumps(Bad()), "not an .npy"),
        (huge, "promises|not an"),
        (header[:-8], "promises"),
        (npy(array.astype(int)), "not floating"),
    ):
        with pytest.raises(ValueError, match=says):
            read_array(content)


def latents(tmp_path, count=6, **more):
    generator = numpy.random.default_rng(0)
    arrays = {
        f"00000/img-mean-std-{i:08d}.npy": generator.normal(size=(8, 4, 6)).astype(numpy.float32) for i in range(count)
    }
    labels = {"labels": [[name, i % 3] for i, name in enumerate(arrays)]}
    content = {name: npy(array) for name, array in arrays.items()} | {"dataset.json": json.dumps(labels)} | more
    return zipped(tmp_path / "latents.zip", content), list(arrays.values())


def test_edm2_latents_are_normalised_and_drawn_once_for_all(tmp_path):
    path, arrays = latents(tmp_path)
    data = EDM2Latents(path=path, held_out=2, seed=3).build()
    assert data.shape == (4, 4, 6) and len(data) == 4 and data.num_classes == 3 and data.held_out.shape == (2, 4, 4, 6)
    x0, cond = data.__getitems__([2, 0])
    assert (
        x0.dtype == torch.float32
        and torch.equal(data.__getitems__([0])[0][0], x0[1])
        and torch.equal(cond["class"], data.labels[[2, 0]])
    )
    assert torch.equal(data.reference[2], x0[0]) and torch.equal(
        data.conditions_at(torch.tensor([0, 2]))["class"], data.labels[[0, 2]]
    )
    every = torch.cat([data.labels, data.held_out_samples()[1]["class"]])[torch.cat([data._kept, data._out]).argsort()]
    assert every.tolist() == data._labels.tolist() and torch.equal(data.held_out_samples()[0], data.held_out[:])
    assert torch.equal(data.reference_labels, data.labels)
    # the published figures, compared with the formula in float64:
    # raw = mean + std * noise, final = (raw - raw_mean) / raw_std * 0.5
    place = int(data._kept[2])
    raw = (
        torch.from_numpy(arrays[place][:4]).double()
        + torch.from_numpy(arrays[place][4:]).double() * data._noise(place).double()
    )
    mean, std = (torch.tensor(v).double().view(4, 1, 1) for v in ((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)))
    torch.testing.assert_close(x0[0].double(), (raw - mean) / std * 0.5, rtol=0, atol=1e-6)  # float32


def test_hostile_latents(tmp_path, capsys):
    path, _ = latents(tmp_path, **{"00000/img-mean-std-00000099.npy": npy(numpy.array([Bad()]))})
    assert len(EDM2Latents(path=path).build()) == 6 and "img-mean-std-00000099.npy" in capsys.readouterr().err
    path, _ = latents(tmp_path, **{"00000/aa.npy": npy(numpy.array([Bad()]))})
    with pytest.raises(ValueError, match="aa.npy.*pickled"):
        EDM2Latents(path=path).build()
    with pytest.raises(ValueError, match="are data .kind: edm2_zip"):
        EDM2Images(path=path).length()


def samples(count):
    return [(f"x/{i:03d}.{end}", content) for i in range(count) for end, content in (
        ("cls", b"%d" % (i % 3)), ("png", png(10 * i)), ("txt", f"text {i}".encode()))]  # fmt: skip


def test_webdataset(tmp_path):
    tarred(tmp_path / "b-0.tar", samples(3))
    tarred(tmp_path / "b-1.tar", [])
    tarred(
        tmp_path / "b-2.tar",
        [("deep/" * 60 + "long.png", png(30)), ("deep/" * 60 + "long.json", b'{"caption": "far"}'), ("README", b"")],
    )
    source = WebDatasetImages(shards=(str(tmp_path / "b-*.tar"), str(tmp_path / "b-0.tar")), size=4)
    found = told(source.items())
    assert [row[1:] for row in found[:4]] == [
        (0, "text 0", 0),
        (1, "text 1", 10),
        (2, "text 2", 20),
        (None, "far", 30),
    ] and len(found) == 7
    assert found[0][0] == "b-0.tar/x/000"
    check_positions(source)


def test_webdataset_reads_what_webdataset_writes(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        for i in range(5):
            writer.write({"__key__": f"s{i}", "png": png(i), "cls": i, "json": {"text": f"t{i}"}})
    source = WebDatasetImages(shards=(str(tmp_path / "w.tar"),))
    assert [row[1:] for row in told(source.items())] == [(i, f"t{i}", i) for i in range(5)]
    theirs = [sample["__key__"] for sample in webdataset.WebDataset(str(tmp_path / "w.tar"), shardshuffle=False)]
    assert [f"w.tar/{key}" for key in theirs] == [item.key for item in source.items()]


def test_a_hostile_tar(tmp_path, monkeypatch):
    monkeypatch.setattr("flowmap.data.images.webdataset.MAX_FILE_BYTES", 50_000)
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    entries = [
        ("../up.png", png(1)), (link, b""), ("big.png", bytes(60_000)), ("odd.cls", b"-3"), ("odd.png", png(2)),
        ("none.cls", b"3"), ("twice.png", png(1)), ("twice.png", png(2)), ("bad.json", b"{"), ("bad.png", png(3)),
        ("code.pkl", pickle.dumps(Bad())), ("code.pyd", pickle.dumps(Bad())), ("good.png", png(4)),
    ]  # fmt: skip
    path = tarred(tmp_path / "h.tar", entries)
    found = [(item.key.removeprefix("h.tar/"), item.problem) for item in WebDatasetImages(shards=(path,)).items()]
    words = ["points out", "link", "bytes", "label", "no picture", "twice", ".json", "no picture", None]
    assert len(found) == len(words)
    assert all(problem is word is None or word in problem for (_, problem), word in zip(found, words, strict=True)), (
        found
    )
    for cut in (700, 1024, 3000):
        (tmp_path / "torn.tar").write_bytes((tmp_path / "h.tar").read_bytes()[:cut])
        with pytest.raises(ValueError, match="torn.tar"):
            WebDatasetImages(shards=(str(tmp_path / "torn.tar"),)).length()
    with pytest.raises(ValueError, match="no such file"):
        WebDatasetImages(shards=("pipe:touch hacked",)).length()


@pytest.mark.parametrize("end", [1024, 10_240, 512])
def test_tars_joined_into_one_lose_no_sample(tmp_path, end):
    parts = []
    for low, high in ((0, 3), (2, 5), (0, 0), (5, 6)):  # samples 2 and 2 meet, and are two
        tarred(tmp_path / "part.tar", samples(6)[3 * low : 3 * high])
        content = (tmp_path / "part.tar").read_bytes().rstrip(b"\0")
        parts.append(content.ljust(-(-len(content) // 512) * 512, b"\0") + bytes(end))
    (tmp_path / "joined.tar").write_bytes(b"".join(parts))
    source = WebDatasetImages(shards=(str(tmp_path / "joined.tar"),), size=4)
    assert [row[1:] for row in told(source.items())] == [(i % 3, f"text {i}", 10 * i) for i in (0, 1, 2, 2, 3, 4, 5)]
    assert source.num_captions() == 7
    check_positions(source)


def test_a_tar_damaged_or_cut_anywhere_is_refused(tmp_path):
    whole = open(tarred(tmp_path / "whole.tar", samples(4)), "rb").read().rstrip(b"\0")
    whole = whole.ljust(-(-len(whole) // 512) * 512, b"\0")
    headers = [m.offset for m in tarfile.open(tmp_path / "whole.tar").getmembers()]
    for cut in (len(whole), len(whole) - 512, headers[5], headers[5] + 100, headers[-1] + 511):
        (tmp_path / "torn.tar").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="torn.tar"):
            WebDatasetImages(shards=(str(tmp_path / "torn.tar"),)).length()
    for place in (headers[0], headers[5], headers[-1]):  # a header's checksum no longer holds
        (tmp_path / "torn.tar").write_bytes(whole[:place] + b"?" + whole[place + 1 :] + bytes(1024))
        with pytest.raises(ValueError, match="torn.tar"):
            WebDatasetImages(shards=(str(tmp_path / "torn.tar"),)).length()
    (tmp_path / "torn.tar").write_bytes(whole + bytes(1024) + b"rubbish".ljust(512))
    with pytest.raises(ValueError, match="torn.tar.*begins no file"):
        WebDatasetImages(shards=(str(tmp_path / "torn.tar"),)).length()


def test_captions_of_a_tar_that_are_not_utf8_are_named(tmp_path):
    path = tarred(
        tmp_path / "c.tar",
        [("a.png", png(1)), ("a.txt", b"caf\xe9"), ("b.png", png(2)), ("b.txt", "\ufeffcafé\n".encode())],
    )
    found = list(WebDatasetImages(shards=(path,)).items())
    assert "its caption cannot be read: it is not UTF-8" in found[0].problem and found[1].caption == "café"


def test_further_pictures_of_a_sample_are_counted(tmp_path):
    path = tarred(
        tmp_path / "m.tar", [("a.jpg", png(1)), ("a.png", png(20)), ("b.png", png(30)), ("b.seg.png", png(4))]
    )
    source = WebDatasetImages(shards=(path,), size=4)
    assert [int(item.image[0, 0, 0]) for item in source.items()] == [20, 30]
    assert source.skipped() == {"further pictures of a sample": {"count": 1, "first": ["a.jpg"]}}


def test_what_is_said_of_a_broken_picture_is_the_same_again(tmp_path):
    path = tarred(tmp_path / "b.tar", [("a.png", b"no picture"), ("b.png", png(2)[:-20])])
    first, again = ([item.problem for item in WebDatasetImages(shards=(path,)).items()] for _ in range(2))
    assert first == again and "0x" not in "".join(first)


def test_labels_of_an_edm2_zip_match_its_entries(tmp_path, capsys):
    names = [f"00000/img{i:08d}.png" for i in range(3)]
    entries = {name: png(10 * i) for i, name in enumerate(names)}

    def made(labels, kind=EDM2Images, **more):
        return kind(path=zipped(tmp_path / "p.zip", entries | more | {"dataset.json": json.dumps({"labels": labels})}))

    for way in ("./{}", "{}", "00000\\{}"):
        source = made([[way.format(name if "0\\" not in way else name[6:]), i] for i, name in enumerate(names)])
        assert [item.label for item in source.items()] == [0, 1, 2] and source.skipped() == {}
    with pytest.raises(
        ValueError,
        match="no label of dataset.json matches an entry: 'img0.png' there, '00000/img00000000.png' in the zip",
    ):
        made([["img0.png", 1]]).length()
    with pytest.raises(ValueError, match="has the classes 1 and 2"):
        made([[names[0], 1], [names[0], 2]]).length()
    source = made([[names[1], 1], ["gone.png", 9]], **{"__MACOSX/00000/._img.png": b"x"})
    assert [item.label for item in source.items()] == [None, 1, None] and source.num_classes() == 2
    first = {reason: one["first"] for reason, one in source.skipped().items()}
    assert first == {"hidden": ["__MACOSX/00000/._img.png"], "labels without an entry": ["gone.png"]}
    path, _ = latents(tmp_path, **{"dataset.json": json.dumps({"labels": [["00000/img00000000.png", 1]]})})
    with pytest.raises(ValueError, match="no label of dataset.json matches an entry"):
        EDM2Latents(path=path).build()
    path, _ = latents(
        tmp_path, **{"dataset.json": json.dumps({"labels": [["00000/img-mean-std-00000000.npy", 1], ["gone.npy", 9]]})}
    )
    assert EDM2Latents(path=path).build().num_classes == 2
    said = capsys.readouterr().err
    assert "1 labels without an entry: gone.npy" in said and "5 of 6 latents have no class" in said


def test_the_fingerprint_of_a_zip_knows_its_labels(tmp_path):
    tables = (json.dumps({"labels": [["a.png", label]]}) for label in (0, 1))
    assert (
        len(
            {
                EDM2Images(path=zipped(tmp_path / "p.zip", {"a.png": png(1), "dataset.json": table})).fingerprint()
                for table in tables
            }
        )
        == 2
    )
