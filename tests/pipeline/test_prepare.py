import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.config import CocoSource, PolicySettings, SyntheticSettings
from pipeline.errors import UserError
from pipeline.prepare import check, prepare
from pipeline.sample import Sample, sample_from_row
from pipeline.shards import ShardSet, read_manifest
from pipeline.synthetic import draw_sample
from tests.pipeline.factories import Prepared, experiment, noise, png, tree, two_sources

pytestmark = pytest.mark.cluster


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_all_rows_of_all_sources_are_there(prepared: Prepared) -> None:
    training, validation = ShardSet(prepared.data.training), ShardSet(prepared.data.validation)
    for shards, names in ((training, ["animals.json", "birds.json"]), (validation, ["validation.json"])):
        expected = [
            (index, image["id"], image["file_name"])
            for index, name in enumerate(names)
            for image in sorted(prepared.contents[name]["images"], key=lambda image: image["id"])
        ]
        rows = list(shards.read_rows(range(len(shards))))
        assert [(row["source"], row["image_id"], row["file_name"]) for row in rows] == expected
        number = sum(len(prepared.contents[name]["annotations"]) for name in names)
        assert sum(len(row["classes"]) for row in rows) == number
    assert validation.manifest.class_names == training.manifest.class_names == ("cat", "dog", "bird")
    assert validation.manifest.sources[0].category_ids == (9, 4, 5)
    assert prepared.said[:4] == [
        "data: validation problems: 3 crowd (kept), 1 image_without_annotations (kept)",
        f"data: wrote validation shards: 7 images to {prepared.data.validation}",
        "data: training problems: 5 crowd (kept), 3 image_without_annotations (kept)",
        f"data: wrote training shards: 21 images to {prepared.data.training}",
    ]
    assert prepared.said[4].startswith("data: anchors: model.anchors.scales [")
    assert prepared.said[5:] == [
        f"data: what is in them stands in {Path(prepared.data.training).parent / 'report.html'}"
    ]
    storage_path = Path(prepared.config.run.storage_path)
    assert Path(prepared.data.training).parent.parent == storage_path / "shards"


def test_second_time_nothing_is_written(prepared: Prepared) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(prepared.config.run.storage_path).rglob("*")}
    said: list[str] = []
    assert prepare(prepared.config, said.append) == prepared.data
    assert said == [
        f"data: validation shards are there: 7 images in {prepared.data.validation}",
        f"data: training shards are there: 21 images in {prepared.data.training}",
    ]
    assert {path: path.stat().st_mtime_ns for path in Path(prepared.config.run.storage_path).rglob("*")} == before


def test_shards_can_come_without_what_they_were_made_from(prepared: Prepared, tmp_path: Path) -> None:
    shutil.copytree(Path(prepared.data.training).parent, tmp_path / "shards")
    settings = {"root": str(tmp_path / "elsewhere"), "shards": str(tmp_path / "shards")}
    data = prepared.config.data.model_copy(update=settings)
    said: list[str] = []
    brought = prepare(prepared.config.model_copy(update={"data": data}), said.append)
    assert brought.training == str(tmp_path / "shards" / "training")
    assert read_manifest(brought.training).digest == read_manifest(prepared.data.training).digest
    assert all("shards are there" in line for line in said)
    shutil.rmtree(tmp_path / "shards" / "validation")
    with pytest.raises(UserError, match="no such annotation file"):
        prepare(prepared.config.model_copy(update={"data": data}), said.append)


def test_writing_shows_how_far_it_has_come(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.prepare.PROGRESS_SECONDS", 0.0)
    two_sources(tmp_path / "data")
    config = experiment(tmp_path / "data", tmp_path / "runs")
    said: list[str] = []
    prepare(config, said.append)
    shown = [line for line in said if line.startswith("data: training shards: ")]
    assert len(shown) == 6, "one for each shard of at most 4 rows"
    assert shown[-1] == "data: training shards: 21 of 21 images, 0:00 left"


def test_only_the_split_that_changed_is_written_again(local_ray: None, tmp_path: Path) -> None:
    two_sources(tmp_path)
    config = experiment(tmp_path, tmp_path / "runs", shards=str(tmp_path / "shards"))
    prepare(config, lambda line: None)
    edit(tmp_path / "birds.json", lambda content: content["annotations"].pop())
    said: list[str] = []
    prepare(config, said.append)
    told = [line.split(":")[1] for line in said if " wrote " in line or " are there" in line]
    assert told == [" validation shards are there", " wrote training shards"]


def test_validation_follows_the_classes_of_the_training_data(local_ray: None, tmp_path: Path) -> None:
    """Numbers of classes come from the training files, so validation shards of before would hold wrong ones."""
    two_sources(tmp_path)
    shards = str(tmp_path / "shards")
    forward = experiment(tmp_path, tmp_path / "runs", shards=shards)
    data = prepare(forward, lambda line: None)
    before = [row["classes"].tolist() for row in ShardSet(data.validation).read_rows(range(7))]
    backward = experiment(tmp_path, tmp_path / "runs", shards=shards, sources=forward.data.sources[::-1])
    prepare(backward, lambda line: None)
    manifest = read_manifest(data.validation)
    assert manifest.class_names == read_manifest(data.training).class_names == ("dog", "bird", "cat")
    after = [row["classes"].tolist() for row in ShardSet(data.validation).read_rows(range(7))]
    assert after == [[{1: 3, 2: 1, 3: 2}[class_id] for class_id in row] for row in before]


def test_same_data_in_another_folder_have_the_same_digest(prepared: Prepared, tmp_path: Path) -> None:
    shutil.copytree(prepared.root, tmp_path / "moved")
    moved = prepare(experiment(tmp_path / "moved", tmp_path / "runs"), lambda line: None)
    assert read_manifest(moved.training).digest == read_manifest(prepared.data.training).digest
    assert read_manifest(moved.validation).digest == read_manifest(prepared.data.validation).digest


def test_dropped_annotations_are_told_and_kept_in_the_quarantine(local_ray: None, tmp_path: Path) -> None:
    contents = two_sources(tmp_path)
    first, second, third = (a["id"] for a in contents["animals.json"]["annotations"][:3])

    def spoil(content: dict[str, Any]) -> None:
        content["annotations"][0]["bbox"][2] = 0
        content["annotations"][1]["bbox"][3] = -1
        content["annotations"][2]["segmentation"] = [[-30, -30, -20, -30, -20, -20]]  # outside: covers no pixel

    edit(tmp_path / "animals.json", spoil)
    said: list[str] = []
    data = prepare(experiment(tmp_path, tmp_path / "runs"), said.append)
    assert "data: training quarantine: 2 box_without_size, 1 empty_mask" in said
    assert read_manifest(data.training).num_quarantined == (0, 3)
    table = pq.read_table(Path(data.training).parent / "quarantine.parquet").to_pylist()
    assert {(row["split"], row["level"], row["annotation_id"], row["kind"]) for row in table} == {
        ("training", "annotation", first, "box_without_size"),
        ("training", "annotation", second, "box_without_size"),
        ("training", "annotation", third, "empty_mask"),
    }
    kept = {int(number) for row in ShardSet(data.training).read_rows(range(12)) for number in row["annotation_ids"]}
    assert kept == {a["id"] for a in contents["animals.json"]["annotations"]} - {first, second, third}


def test_shapes_come_in_by_the_same_door(local_ray: None, tmp_path: Path) -> None:
    config = experiment(
        tmp_path / "shapes",
        tmp_path / "runs",
        sources=(CocoSource(annotations="annotations/instances_train.json"),),
        validation_sources=(CocoSource(annotations="annotations/instances_val.json"),),
        synthetic=SyntheticSettings(training_images=6, validation_images=3),
        canvases=((128, 128),),
    )
    said: list[str] = []
    data = prepare(config, said.append)
    assert said[0] == f"data: wrote the shapes data set to {tmp_path / 'shapes'}"
    assert read_manifest(data.training).class_names == ("circle", "square", "triangle")
    assert (read_manifest(data.training).num_rows, read_manifest(data.validation).num_rows) == (6, 3)
    for split, folder in (("train", data.training), ("val", data.validation)):
        shards = ShardSet(folder)
        for row in range(len(shards)):  # nothing is lost on the way
            sample, drawn = sample_from_row(shards.read_row(row)), draw_sample(0, split, row)
            for field in dataclasses.fields(Sample):
                np.testing.assert_array_equal(getattr(sample, field.name), getattr(drawn, field.name))


def removed(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).unlink()


def with_text(name: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(text)


def without(key: str) -> Callable[[Path], object]:
    return lambda root: edit(root / "birds.json", lambda content: content.pop(key))


def without_images(root: Path) -> None:
    edit(root / "birds.json", lambda content: content.update(images=[], annotations=[]))


def with_image(**values: Any) -> Callable[[Path], object]:
    return lambda root: edit(root / "birds.json", lambda content: content["images"][0].update(values))


def with_annotation(**values: Any) -> Callable[[Path], object]:
    return lambda root: edit(root / "birds.json", lambda content: content["annotations"][0].update(values))


def unknown_class(root: Path) -> None:
    edit(root / "validation.json", lambda content: content["categories"].append({"id": 77, "name": "owl"}))


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (removed("birds.json"), ["birds.json", "no such annotation file", "data.sources"]),
        (with_text("birds.json", "{"), ["birds.json", "not a JSON file"]),
        (without("annotations"), ["birds.json", "'annotations'"]),
        (without_images, ["birds.json", "lists no images"]),
        (removed("images/bird_003.png"), ["images", "1 of 9 images", "bird_003.png"]),
        (with_image(id=11), ["birds.json", "image id 11 stands there twice"]),
        (with_annotation(category_id=99), ["birds.json", "category_id 99"]),
        (with_annotation(image_id=99), ["birds.json", "image_id 99"]),
        (with_annotation(bbox=[1, 2, float("nan"), 3]), ["birds.json", "bbox"]),
        (with_image(file_name="../animals.json"), ["birds.json", "'../animals.json' leaves the images folder"]),
        (with_image(file_name="/etc/passwd"), ["birds.json", "'/etc/passwd' leaves the images folder"]),
        (with_text("images/bird_003.png", "no image"), ["images/bird_003.png", "cannot be decoded"]),
        (unknown_class, ["validation.json", "'owl'"]),
        (with_annotation(segmentation={"size": [48, 64], "counts": "abc"}), ["birds.json", "RLE counts"]),
    ],
)
def test_bad_data_leave_nothing_half_written(
    local_ray: None, tmp_path: Path, spoil: Callable[[Path], object], names: list[str]
) -> None:
    two_sources(tmp_path / "data")
    spoil(tmp_path / "data")
    with pytest.raises(UserError) as caught:
        prepare(experiment(tmp_path / "data", tmp_path / "runs"), lambda line: None)
    message = str(caught.value)
    assert "\n" not in message
    for name in names:
        assert name in message
    assert only_a_report(tmp_path / "runs")


def only_a_report(folder: Path) -> bool:
    """Whether a folder holds nothing but what was found."""
    names = {path.rsplit("/", 1)[-1] for path in tree(folder)} if folder.exists() else set()
    return names in (set(), {"report.json", "report.html", "quarantine.parquet", "anchor_search.yaml"})


def spoil_three_files(root: Path) -> None:
    """A file that is missing and an id that stands there twice to train on, a class that is none to validate on."""
    (root / "images" / "animal_000.png").unlink()
    edit(root / "birds.json", lambda content: content["annotations"].append(content["annotations"][0]))
    edit(root / "validation.json", lambda content: content["annotations"][0].update(category_id=99))


def test_all_that_stops_the_job_is_told_at_once(tmp_path: Path) -> None:
    contents = two_sources(tmp_path / "data")
    spoil_three_files(tmp_path / "data")
    names = ("animals.json", "birds.json", "validation.json")
    files = ", ".join(str(tmp_path / "data" / name) for name in names)
    twice, classless = (contents[name]["annotations"][0]["id"] for name in names[1:])
    said: list[str] = []
    with pytest.raises(UserError) as caught:
        check(experiment(tmp_path / "data", tmp_path / "runs"), said.append)
    assert str(caught.value) == (
        f"3 kinds of problem in {files} stop the job: 1 missing_file (animal_000.png), "
        f"1 duplicate_annotation_id (annotation id {twice} stands there twice), "
        f"1 unknown_category (annotation {classless}: category_id 99 is none of the categories); mend the data, "
        "or add --data.policies.missing_file drop --data.policies.duplicate_annotation_id drop "
        "--data.policies.unknown_category drop"
    )
    assert [line.split(":")[1] for line in said[:3]] == [
        " missing_file stops the job", " duplicate_annotation_id stops the job", " unknown_category stops the job",
    ]  # fmt: skip
    for line, name in zip(said, names, strict=False):
        assert str(tmp_path / "data" / name) in line
    assert said[3] == "data: no image was opened yet; what is wrong with them is told once this is settled"
    assert only_a_report(tmp_path / "runs")
    policies = dict.fromkeys(("missing_file", "duplicate_annotation_id", "unknown_category"), "drop")
    checked = check(experiment(tmp_path / "data", tmp_path / "runs", policies=policies), said.append)
    assert checked.training.quarantined, "with these it goes on"


def counted(folder: Path) -> dict[str, tuple[list[int], list[int]]]:
    """Images and annotations of each split as the report counts them; read is the sum of the others."""
    splits = json.loads(next(folder.rglob("report.json")).read_text())["splits"]
    for split in splits.values():
        for counts in (split["images"], split["annotations"]):
            assert list(counts) == ["read", "kept", "quarantined", "stopping"]
            assert counts["read"] == counts["kept"] + counts["quarantined"] + counts["stopping"]
    return {name: (list(s["images"].values()), list(s["annotations"].values())) for name, s in splits.items()}


def test_report_of_stopped_data_adds_up(tmp_path: Path) -> None:
    """An image that stops the job has its annotations with it; what is left out for other reasons is told apart."""
    contents = two_sources(tmp_path / "data")
    animals = contents["animals.json"]
    of_missing = next(image["id"] for image in animals["images"] if image["file_name"] == "animal_000.png")
    number = sum(annotation["image_id"] == of_missing for annotation in animals["annotations"])
    assert number > 1
    spoil_three_files(tmp_path / "data")
    edit(tmp_path / "data" / "birds.json", lambda content: content["annotations"][1]["bbox"].__setitem__(2, 0))
    with pytest.raises(UserError):
        check(experiment(tmp_path / "data", tmp_path / "runs"), lambda line: None)
    (_, kept, *others), (_, _, *of_annotations) = counted(tmp_path / "runs")["training"]
    assert (kept, others, of_annotations) == (20, [0, 1], [1, number + 1])
    assert counted(tmp_path / "runs")["validation"][1][2:] == [0, 1]
    page = next((tmp_path / "runs").rglob("report.html")).read_text()
    assert page.count("<b>Stopped:</b> 3 kinds of problem in ") == 1
    assert page.index("Stopped:") < page.index("those up to there") < page.index("<table>")
    assert page.count(">stopping the job</th>") == 2


def test_report_of_data_that_their_images_stop_adds_up(local_ray: None, tmp_path: Path) -> None:
    contents = two_sources(tmp_path / "data")
    birds = contents["birds.json"]
    with_objects = {annotation["image_id"] for annotation in birds["annotations"]}
    image = next(image for image in birds["images"] if image["id"] in with_objects)
    number = sum(annotation["image_id"] == image["id"] for annotation in birds["annotations"])
    (tmp_path / "data" / "images" / image["file_name"]).write_bytes(b"no image")
    edit(
        tmp_path / "data" / "animals.json",
        lambda c: c["annotations"][0].update(segmentation=[[-9, -9, -5, -9, -5, -5]]),
    )
    config = experiment(tmp_path / "data", tmp_path / "runs", policies={"empty_mask": "error"})
    with pytest.raises(UserError, match=r"^2 kinds of problem in .* stop the job: .*empty_mask drop") as caught:
        prepare(config, lambda line: None)
    assert f"{tmp_path}/data/images/{image['file_name']}: cannot be decoded" in str(caught.value)
    assert only_a_report(tmp_path / "runs")
    (_, kept, *others), (_, _, *of_annotations) = counted(tmp_path / "runs")["training"]
    assert (kept, others, of_annotations) == (20, [0, 1], [0, number + 1])


def test_annotations_are_checked_without_ray_and_without_writing(tmp_path: Path) -> None:
    two_sources(tmp_path / "data")
    checked = check(experiment(tmp_path / "data", tmp_path / "runs"), lambda line: None)
    assert checked.class_map.names == ("cat", "dog", "bird")
    assert (len(checked.training.records), len(checked.validation.records)) == (21, 7)
    assert not (tmp_path / "runs").exists()


def test_bad_validation_images_stop_the_job_before_the_training_images_are_read(
    local_ray: None, tmp_path: Path
) -> None:
    two_sources(tmp_path / "data")
    (tmp_path / "data" / "images" / "val_002.png").write_bytes(b"no image")
    said: list[str] = []
    with pytest.raises(UserError, match="val_002"):
        prepare(experiment(tmp_path / "data", tmp_path / "runs"), said.append)
    assert only_a_report(tmp_path / "runs")
    assert not any("training" in line for line in said)


@pytest.mark.parametrize("existed", [False, True])
def test_training_images_that_cannot_be_used_leave_no_new_validation_shards(
    existed: bool, local_ray: None, tmp_path: Path
) -> None:
    contents = two_sources(tmp_path / "data")
    config = experiment(tmp_path / "data", tmp_path / "runs", shards=str(tmp_path / "shards"))
    if existed:
        prepare(config, lambda line: None)
        edit(tmp_path / "data" / "validation.json", lambda content: content["annotations"].pop())
    before = set((tmp_path / "shards").rglob("*.arrow"))
    (tmp_path / "data" / "images" / contents["birds.json"]["images"][0]["file_name"]).write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot be decoded"):
        prepare(config, lambda line: None)
    assert (tmp_path / "shards" / "validation").exists() is existed
    assert {path for path in before if path.parent.name == "validation"} <= set((tmp_path / "shards").rglob("*.arrow"))


def test_training_images_are_compared_again_where_what_is_validated_on_has_changed(
    local_ray: None, tmp_path: Path
) -> None:
    contents = two_sources(tmp_path / "data")
    config = experiment(tmp_path / "data", tmp_path / "runs", shards=str(tmp_path / "shards"))
    prepare(config, lambda line: None)
    trained = contents["birds.json"]["images"][0]
    copy = {**trained, "id": 4711, "file_name": "copy.png"}
    images = tmp_path / "data" / "images"
    (images / "copy.png").write_bytes((images / trained["file_name"]).read_bytes())
    edit(tmp_path / "data" / "validation.json", lambda content: content["images"].append(copy))
    said: list[str] = []
    prepare(config, said.append)
    assert any("training problems" in line and "1 image_in_both_splits (kept)" in line for line in said)


@pytest.mark.parametrize("already_there", [False, True])
def test_images_that_are_validated_on_under_another_name_are_told(
    already_there: bool, local_ray: None, tmp_path: Path
) -> None:
    contents = two_sources(tmp_path / "data")
    images = tmp_path / "data" / "images"
    validated, trained = (contents[name]["images"][0] for name in ("validation.json", "birds.json"))
    config = experiment(tmp_path / "data", tmp_path / "runs", shards=str(tmp_path / "shards"))
    if already_there:
        prepare(config, lambda line: None)
    (images / trained["file_name"]).write_bytes((images / validated["file_name"]).read_bytes())
    size = {"height": validated["height"], "width": validated["width"]}
    edit(tmp_path / "data" / "birds.json", lambda content: content["images"][0].update(size))
    said: list[str] = []
    data = prepare(config, said.append)
    assert ("data: validation shards are there" in said[0]) is already_there
    assert any("1 image_in_both_splits (kept)" in line for line in said)
    assert not any("duplicate_image" in line for line in said)
    settings = config.data.model_copy(update={"policies": PolicySettings(image_in_both_splits="drop")})
    data = prepare(config.model_copy(update={"data": settings}), said.append)
    names = {row["file_name"] for row in ShardSet(data.training).read_rows(range(20))}
    assert len(names) == len(ShardSet(data.training)) == 20
    assert trained["file_name"] not in names


def test_image_of_another_size_is_named_with_a_hint(local_ray: None, tmp_path: Path) -> None:
    contents = two_sources(tmp_path / "data")
    image = contents["birds.json"]["images"][0]
    (tmp_path / "data" / "images" / image["file_name"]).write_bytes(png(noise(image["width"], image["height"])))
    with pytest.raises(UserError, match=r"height and width are exchanged: has the file lost its EXIF orientation\?"):
        prepare(experiment(tmp_path / "data", tmp_path / "runs"), lambda line: None)
    assert only_a_report(tmp_path / "runs")


def test_failure_leaves_the_data_set_of_before_out_of_use(local_ray: None, tmp_path: Path) -> None:
    """Its shards may have been replaced, so it must not look whole."""
    two_sources(tmp_path)
    config = experiment(tmp_path, tmp_path / "runs", shards=str(tmp_path / "shards"))
    data = prepare(config, lambda line: None)
    edit(tmp_path / "birds.json", lambda content: content["annotations"].pop())
    (tmp_path / "images" / "bird_003.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="bird_003"):
        prepare(config, lambda line: None)
    with pytest.raises(UserError, match="no such manifest"):
        ShardSet(data.training)
    (tmp_path / "images" / "bird_003.png").write_bytes(png(noise(64, 48)))
    prepare(config, lambda line: None)
    assert len(ShardSet(data.training)) == 21
