"""Plans: what they count, their file, and the models they are for."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.passes.allocate.plan import VERSION, Plan, PlanError, SitePlan

PLAN = Plan(
    sites=(
        SitePlan("layers.0.attention", SiteShape(2, 64, 64), Precision(3, 32, 4), Precision(2, 32, 4)),
        SitePlan("layers.1.attention", SiteShape(2, 64, 32), Precision(4, 32, 16), Precision(16)),
    ),
    policy="fisher",
    fingerprint="f00d",
    sinks=64,
    recent=128,
)

precisions = st.builds(
    Precision,
    bits=st.sampled_from([1, 2, 3, 4, 8, 16]),
    group=st.sampled_from([8, 16, 32]),
    scale_bits=st.sampled_from([4, 16]),
)
dims = st.integers(1, 512)
shapes = st.builds(SiteShape, dims, dims, dims)


@st.composite
def sites_with_important_channels(draw: st.DrawFn) -> SitePlan:
    kv_heads, key_dim = draw(st.integers(1, 4)), 32 * draw(st.integers(1, 4))
    heads = [draw(st.permutations("0123" * (key_dim // 4))) for _ in range(kv_heads)]
    important_bits = draw(st.sampled_from([(3,), (4, 4), (8, 4, 3)]))
    key = Precision(2, draw(st.sampled_from([16, 32])), 4, important_bits)
    tiers, window = tuple(map("".join, heads)), draw(st.sampled_from([0, 1, 4096]))
    return SitePlan(draw(st.text()), SiteShape(kv_heads, key_dim, draw(dims), window), key, draw(precisions), tiers)


plans = st.builds(
    Plan,
    sites=st.lists(
        st.builds(SitePlan, st.text(), shapes, precisions, precisions) | sites_with_important_channels(),
        min_size=1,
        max_size=4,
    ).map(tuple),
    policy=st.text(),
    fingerprint=st.text(),
    sinks=st.integers(0, 1000),
    recent=st.integers(0, 1000),
    exact_chunks=st.booleans(),
    context=st.sampled_from([0, 1, 8192]),
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan") / "plan.json"


@given(plan=plans)
def test_a_plan_of_version_4_is_read(file: Path, plan: Plan) -> None:
    plan.save(file)
    document = file.read_text().replace(f'"version": {VERSION}', '"version": 4')
    file.write_text(document.replace('"channel_tiers"', '"channel_quarters"'))
    assert Plan.load(file) == plan


@given(plan=plans)
def test_loading_gives_what_was_saved(file: Path, plan: Plan) -> None:
    plan.save(file)
    assert Plan.load(file) == plan
    assert os.listdir(file.parent) == [file.name]


def test_important_tiers_come_first_and_count_as_such() -> None:
    tiers = ("0000111122223333", "3120" * 4)
    site = SitePlan("attention", SiteShape(2, 16, 16), Precision(2, 32, 4, (4, 3)), Precision(2, 32, 4), tiers)
    plan = replace(PLAN, sites=(site,))
    assert plan.key_bits == 2.75 and plan.code_bits == 2.375
    first, second = site.channel_order
    assert first == list(range(16))
    assert second == [3, 7, 11, 15, 1, 5, 9, 13, 2, 6, 10, 14, 0, 4, 8, 12]
    assert PLAN.sites[0].channel_order is None


@pytest.mark.parametrize(
    ("important_bits", "tiers"),
    [
        ((), ("0123" * 4,) * 2),
        ((4, 4), ()),
        ((4, 4), ("0123" * 4,)),
        ((4, 4), ("0123" * 4, "0122" * 4)),
        ((4, 4), ("0123" * 4, "0124" * 4)),
        ((4, 4), ("0123" * 4, "0123" * 5)),
    ],
)
def test_tiers_that_are_none_are_refused(important_bits: tuple[int, ...], tiers: tuple[str, ...]) -> None:
    with pytest.raises(PlanError, match="channel_tiers"):
        SitePlan("attention", SiteShape(2, 16, 16), Precision(2, 32, 4, important_bits), Precision(2, 32, 4), tiers)


@pytest.mark.parametrize("content", [3, [3, "0123"], [None], ["0123"]])
def test_damaged_tiers_in_a_file_are_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(PlanError, match=r"plan\.json: .*channel_tiers"):
        load_changed(tmp_path, ["sites", 0, "channel_tiers"], content)


@pytest.mark.parametrize("content", [4, ["4"], [True], [2]])
def test_damaged_important_bits_in_a_file_are_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(PlanError, match=r"plan\.json: .*(important|bits)"):
        load_changed(tmp_path, ["sites", 0, "key", "important_bits"], content)


@pytest.mark.parametrize("content", [-1, "24", 2.5, None])
def test_damaged_windows_in_a_file_are_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(PlanError, match=r"plan\.json: .*window"):
        load_changed(tmp_path, ["sites", 0, "window"], content)


def test_windows_are_those_of_the_model_at_hand() -> None:
    plan = PLAN.with_windows([300, 200])
    assert [site.window for site in plan.sites] == [300, 200]
    assert plan.cache_bytes(1000) == plan.cache_bytes(10**6) < PLAN.cache_bytes(1000)
    assert plan.with_windows([0, 0]) == PLAN


def test_a_window_that_recent_tokens_hold_is_kept_as_it_is() -> None:
    plan = PLAN.with_windows([129, 130])
    whole, quantized = plan.sites
    assert whole.key == whole.value == Precision(16) and quantized == replace(
        PLAN.sites[1], shape=SiteShape(2, 64, 32, window=130)
    )
    # 128 keys and values of 2 heads of 64 channels, beside what the other site and the counter of a row take.
    others = replace(plan, sites=(quantized,)).cache_bytes(10**6)
    assert plan.cache_bytes(10**6) - others == 2 * 128 * 2 * 64 * torch.bfloat16.itemsize
    assert plan.code_bits == replace(PLAN, sites=PLAN.sites[1:]).code_bits
    assert PLAN.with_windows([1, 1]).code_bits == PLAN.with_windows([1, 1]).storage_bits == 16


def test_processes_store_the_heads_of_a_plan_between_them() -> None:
    tiers = ("0123" * 8, "3210" * 8, "0132" * 8, "1023" * 8)
    key, value = Precision(2, 32, 4, (8, 4, 3)), Precision(4, 32, 4)
    whole = SitePlan("a", SiteShape(4, 32, 32), key, value, tiers, key_exponents=(1, 2, 3, 4), values_rotated=True)
    other = SitePlan("b", SiteShape(4, 32, 32, window=8), value, value)
    plan = Plan((whole, other), "fisher", "0", sinks=4, recent=32)
    parts = [plan.of_heads(number, 2) for number in range(2)]
    assert [site.kv_heads for part in parts for site in part.sites] == [2, 2, 2, 2]
    assert sum((part.sites[0].channel_tiers for part in parts), ()) == tiers
    assert [part.sites[0].key_exponents for part in parts] == [(1, 2), (3, 4)]
    assert [part.sites[0].value_exponents for part in parts] == [(), ()]
    # Each counts the tokens of a row anew.
    assert sum(part.cache_bytes(500) for part in parts) == plan.cache_bytes(500) + torch.int64.itemsize
    assert plan.of_heads(0, 1) is plan


def test_means_are_weighted_by_elements() -> None:
    # Keys: 128 elements of 3 bits and 128 of 4; values: 128 of 2 bits and 64 of 16.
    assert PLAN.key_bits == 3.5
    assert PLAN.value_bits == pytest.approx((128 * 2 + 64 * 16) / 192)
    assert PLAN.code_bits == pytest.approx((128 * 3 + 128 * 4 + 128 * 2 + 64 * 16) / 448)


def test_storage_counts_scales_and_zero_points() -> None:
    # A block of 32 tokens of 64 channels has 64 groups of 32. With 4-bit scales: a byte a group and 8 bytes a block.
    four_bit_scales = (64 + 8) * 8 / (32 * 64)
    stored = 128 * (3 + four_bit_scales) + 128 * (4 + 1) + 128 * (2 + four_bit_scales) + 64 * 16
    assert PLAN.storage_bits == pytest.approx(stored / 448)


def test_the_file_is_readable(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    (first_site,) = [line for line in lines if "layers.0.attention" in line]
    assert '"key": {"bits": 3, "group": 32, "scale_bits": 4}' in first_site


def test_a_plan_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "plan.json"
    PLAN.save(file)

    def full_disk(self: Path, content: str, encoding: str) -> int:
        with self.open("w") as unfinished:
            unfinished.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(PlanError, match="No space left"):
        replace(PLAN, sinks=0).save(file)
    assert Plan.load(file) == PLAN
    assert os.listdir(tmp_path) == ["plan.json"]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read the plan .*absent\.json"):
        Plan.load(tmp_path / "absent.json")
    with pytest.raises(PlanError, match="cannot write"):
        PLAN.save(tmp_path / "absent" / "plan.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": "kvmix-plan", "ver'])
def test_what_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError, match="damaged"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"format": "other"}'])
def test_other_json_is_no_plan(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(PlanError, match="not a plan"):
        Plan.load(tmp_path / "plan.json")


def load_changed(directory: Path, path: list[str | int], content: object) -> Plan:
    """Load the plan after one field of its file was changed, or removed where `content` is Ellipsis."""
    file = directory / "plan.json"
    PLAN.save(file)
    document = json.loads(file.read_text())
    record = document
    for step in path[:-1]:
        record = record[step]
    if content is ...:
        del record[path[-1]]
    else:
        record[path[-1]] = content
    file.write_text(json.dumps(document))
    return Plan.load(file)


def test_a_newer_plan_asks_to_upgrade(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="newer kvmix_compile; upgrade"):
        load_changed(tmp_path, ["version"], VERSION + 1)


@pytest.mark.parametrize(
    "path",
    [
        *([name] for name in ("version", "policy", "fingerprint", "sinks", "recent", "sites")),
        *(["sites", 1, name] for name in ("layer", "kv_heads", "key_dim", "value_dim", "key", "value")),
        *(["sites", 0, "key", name] for name in ("bits", "group", "scale_bits")),
    ],
)
def test_missing_and_mistyped_fields_are_named(tmp_path: Path, path: list[str | int]) -> None:
    with pytest.raises(PlanError, match=rf"plan\.json: .*lacks the field '{path[-1]}'"):
        load_changed(tmp_path, path, ...)
    for wrong in (None, True, 1.5):
        with pytest.raises(PlanError, match=rf"plan\.json: '{path[-1]}' of .* wrong type"):
            load_changed(tmp_path, path, wrong)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        (["version"], 0),
        (["version"], 3),
        (["sinks"], -1),
        (["sites"], []),
        (["sites"], [3]),
        (["sites", 0, "kv_heads"], 0),
        (["sites", 0, "key", "bits"], 5),
        (["sites", 0, "key", "scale_bits"], 8),
        (["sites", 0, "value", "group"], 0),
    ],
)
def test_impossible_numbers_are_refused(tmp_path: Path, path: list[str | int], content: object) -> None:
    with pytest.raises(PlanError, match=r"plan\.json"):
        load_changed(tmp_path, path, content)


LAYERS = [site.layer for site in PLAN.sites]
SHAPES = [site.shape for site in PLAN.sites]


def test_a_plan_knows_its_model() -> None:
    assert PLAN.fitted("f00d", LAYERS, SHAPES) == PLAN.fitted("f00d", LAYERS, SHAPES, strict=True) == PLAN
    with pytest.raises(PlanError, match="another model: the plan has 2 attention sites, this model 3"):
        PLAN.fitted("beef", [*LAYERS, "layers.2.attention"], [*SHAPES, SHAPES[0]])
    with pytest.raises(PlanError, match=r"'layers.0.attention' where this model has 'blocks.0'"):
        PLAN.fitted("beef", ["blocks.0", LAYERS[1]], SHAPES)
    with pytest.raises(PlanError, match=r"at layers.1.attention the plan has value_dim=32, this model value_dim=128"):
        PLAN.fitted("beef", LAYERS, [SHAPES[0], SiteShape(2, 64, 128)])


def test_a_plan_serves_other_versions_of_its_model() -> None:
    assert PLAN.fitted("beef", LAYERS, SHAPES) == replace(PLAN, fingerprint="beef")
    with pytest.raises(PlanError, match="another version of this model.*leave strict out"):
        PLAN.fitted("beef", LAYERS, SHAPES, strict=True)


def test_something_may_stand_in_front_of_all_layers() -> None:
    around = [f"base_model.model.{layer}" for layer in LAYERS]
    fitted = PLAN.fitted("beef", around, SHAPES)
    assert [site.layer for site in fitted.sites] == around
    assert [site.key for site in fitted.sites] == [site.key for site in PLAN.sites]
    assert fitted.fitted("f00d", LAYERS, SHAPES) == PLAN
    for layers in ([around[0], LAYERS[1]], [around[0], f"other.{LAYERS[1]}"], [f"x{LAYERS[0]}", f"x{LAYERS[1]}"]):
        with pytest.raises(PlanError, match="another model"):
            PLAN.fitted("beef", layers, SHAPES)


def test_a_plan_edited_to_other_sites_is_refused() -> None:
    with pytest.raises(PlanError, match="the plan has 2 attention sites, this model 1"):
        PLAN.fitted("f00d", LAYERS[:1], SHAPES[:1])
