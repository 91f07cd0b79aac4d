"""Files of several real ranks united; the spread between ranks drawn."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distbn_convert.checkpoint import (
    convert_checkpoint,
    gather_checkpoints,
    inspect_checkpoint,
    plot_spread,
    revert_checkpoint,
)
from distbn_convert.errors import (
    ConfigurationError,
    NothingToDoError,
    OutputExistsError,
    ReadError,
    RefusedError,
)
from distbn_convert.replicas import reduce_statistics

from .checkpoints import BATCH_NORMS, Net, bn_state, contents, load, run_cli, save, train


def rank_files(folder: Path, ranks: int = 3) -> list[Path]:
    """What ranks save that start from one model and see other data: weights equal, buffers not."""
    paths = []
    for rank in range(ranks):
        torch.manual_seed(0)
        model = Net()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, torch.optim.SGD(model.parameters(), lr=0.0), seed=rank)
        assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
        content = {"model": model.state_dict(), "rank": rank, "rng": torch.get_rng_state()}
        paths.append(folder / f"rank{rank}.pth")
        torch.save(content, paths[-1])
    return paths


def test_case_40_files_of_ranks_become_virtual_ranks(tmp_path: Path) -> None:
    paths = rank_files(tmp_path)
    report = gather_checkpoints(paths, tmp_path / "all.pth")
    assert report.counts == {"gathered": BATCH_NORMS}
    assert report.virtual_ranks == 3
    assert any("differs from the first file in rank" in warning for warning in report.warnings)
    united, parts = load(tmp_path / "all.pth"), [load(path)["model"] for path in paths]
    assert united["rank"] == 0
    for key, value in united["model"].items():
        if key.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(value, torch.stack([part[key] for part in parts]))
        else:
            assert torch.equal(value, parts[0][key])
    assert not torch.equal(parts[0]["head.running_mean"], parts[1]["head.running_mean"])


@pytest.mark.parametrize("reduction", ["mean", "pooled"])
def test_gathering_with_a_reduction_equals_stacking_and_reverting(
    tmp_path: Path, reduction: str
) -> None:
    paths = rank_files(tmp_path)
    gather_checkpoints(paths, tmp_path / "all.pth")
    revert_checkpoint(tmp_path / "all.pth", tmp_path / "reverted.pth", reduction)
    gather_checkpoints(paths, tmp_path / "direct.pth", reduction)
    assert (tmp_path / "direct.pth").read_bytes() == (tmp_path / "reverted.pth").read_bytes()


def test_virtual_ranks_of_real_ranks_are_stacked_in_order_and_pooled_at_once(
    tmp_path: Path,
) -> None:
    paths = rank_files(tmp_path, 2)
    virtual = []
    for path in paths:
        content = load(path)
        for key, value in content["model"].items():
            if "running" in key:
                content["model"][key] = torch.stack([value, value * 2])
            elif "num_batches" in key:
                content["model"][key] = torch.stack([value, value + 1])
        virtual.append(path.with_name("v" + path.name))
        torch.save(content, virtual[-1])
    report = gather_checkpoints(virtual, tmp_path / "all.pth")
    assert report.virtual_ranks == 4
    rows = [load(path)["model"] for path in virtual]
    mean, var = (
        torch.cat([part[f"head.{name}"] for part in rows])
        for name in ("running_mean", "running_var")
    )
    assert torch.equal(load(tmp_path / "all.pth")["model"]["head.running_mean"], mean)
    gather_checkpoints(virtual, tmp_path / "pooled.pth", "pooled")
    pooled = load(tmp_path / "pooled.pth")["model"]
    expected = reduce_statistics(mean, var, "pooled")
    assert torch.equal(pooled["head.running_mean"], expected[0])
    assert torch.equal(pooled["head.running_var"], expected[1])


def change(path: Path, key: str, value: Any) -> None:
    content = load(path)
    if value is None:
        del content["model"][key]
    else:
        content["model"][key] = value
    torch.save(content, path)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("fc.weight", torch.zeros(4, 5), r"the values of model\.fc\.weight differ"),
        ("fc.weight", torch.zeros(4, 6), r"model\.fc\.weight is float32 \(4, 5\) and .*\(4, 6\)"),
        ("fc.bias", None, r"model\.fc\.bias is in .*rank0\.pth alone"),
        ("extra", torch.zeros(1), r"model\.extra is in .*rank1\.pth alone"),
    ],
)
def test_case_40_files_that_differ_in_more_than_statistics_are_refused(
    tmp_path: Path, key: str, value: Any, reason: str
) -> None:
    paths = rank_files(tmp_path, 2)
    change(paths[1], key, value)
    with pytest.raises(ReadError, match=reason):
        gather_checkpoints(paths, tmp_path / "all.pth")
    assert sorted(os.listdir(tmp_path)) == ["rank0.pth", "rank1.pth"]


def test_case_40_files_of_other_numbers_of_ranks_are_refused(tmp_path: Path) -> None:
    paths = rank_files(tmp_path, 2)
    for path, ranks in zip(paths, (2, 3), strict=True):
        convert_checkpoint(path, None, ranks, in_place=True)
    with pytest.raises(ReadError, match=r"conv1_BN\.running_mean is float32 \(2, 5\) and .*\(3, 5"):
        gather_checkpoints(paths, tmp_path / "all.pth")


def test_gather_needs_two_files_and_knows_its_reductions(tmp_path: Path) -> None:
    paths = rank_files(tmp_path, 2)
    with pytest.raises(ConfigurationError, match="at least two inputs"):
        gather_checkpoints(paths[:1], tmp_path / "all.pth")
    for path in (paths[0], str(paths[0])):
        with pytest.raises(ConfigurationError, match=r"sequence of at least two paths.*rank0\.pth"):
            gather_checkpoints(path, tmp_path / "all.pth")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="'stack', 'mean', 'pooled'"):
        gather_checkpoints(paths, tmp_path / "all.pth", "select")
    with pytest.raises(ConfigurationError, match="but got 2 inputs and in_place"):
        gather_checkpoints(paths, None, in_place=True)


def test_gather_replaces_none_of_its_inputs(tmp_path: Path) -> None:
    paths = rank_files(tmp_path, 3)
    before = contents(tmp_path)
    for path in paths[1:]:
        with pytest.raises(OutputExistsError, match=rf"is the input .*{path.name}, which would be"):
            gather_checkpoints(paths, path, overwrite=True)
    # It has no --in-place to advise.
    with pytest.raises(OutputExistsError, match=r"are the same file\. Use another name\.$"):
        gather_checkpoints(paths, paths[0], overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        (lambda rank: {"a": rank}, "a"),
        (lambda rank: {"a": rank, "b": rank, "c": rank}, "a and 2 more"),
        (lambda rank: {"optimizer": {"state": [torch.zeros(2) + rank]}}, "optimizer.state.0"),
        (lambda rank: {"model": bn_state() | {"_extra_state": rank}}, "model._extra_state"),
        (lambda rank: {"model": bn_state() | {f"version{rank}": 2}}, "model"),
        (lambda rank: bn_state() | {"epoch": rank}, "epoch"),
    ],
)
def test_what_differs_beside_the_tensors_of_state_dicts_is_told(
    tmp_path: Path, extra: Any, where: str
) -> None:
    paths = []
    for rank in range(2):
        torch.manual_seed(0)
        paths.append(save(tmp_path, {"model": bn_state()} | extra(rank), f"rank{rank}.pth"))
    report = gather_checkpoints(paths, tmp_path / "all.pth")
    note = f"{paths[1]} differs from the first file in {where}; the first file's were taken."
    assert report.warnings == (note,)


def test_what_differs_beside_the_weights_of_folders_is_told(tmp_path: Path) -> None:
    folders = [tmp_path / f"rank{rank}" for rank in range(3)]
    for rank, folder in enumerate(folders):
        torch.manual_seed(0)
        folder.mkdir()
        save_file(bn_state(), folder / "model.safetensors")
        (folder / "scheduler.bin").write_bytes(b"of all")
        (folder / "optimizer.bin").write_bytes(b"%d" % min(rank, 1))
        (folder / f"random_states_{rank}.pkl").write_bytes(b"")
    report = gather_checkpoints(folders, tmp_path / "all")
    assert report.warnings == (
        f"{folders[1]} differs from the first file in optimizer.bin and 2 more; the first file's "
        "were taken.",
        f"{folders[2]} differs from the first file in optimizer.bin and 2 more; the first file's "
        "were taken.",
    )
    assert (tmp_path / "all" / "optimizer.bin").read_bytes() == b"0"


def test_what_is_not_taken_at_all_is_not_said_to_be_of_the_first_file(tmp_path: Path) -> None:
    paths = []
    for rank in range(2):
        torch.manual_seed(0)
        paths.append(save(tmp_path, {"model": bn_state(), "rng": rank}, f"rank{rank}.pth"))
    settings = {"state": "model", "format": "safetensors"}
    report = gather_checkpoints(paths, tmp_path / "all.safetensors", **settings)
    assert not any("first file" in warning for warning in report.warnings)


def test_at_most_three_differences_of_state_dicts_are_told(tmp_path: Path) -> None:
    state, extra = bn_state(), {f"extra{i}": torch.zeros(1) for i in range(5)}
    paths = [save(tmp_path, state, "a.pth"), save(tmp_path, state | extra, "b.pth")]
    with pytest.raises(ReadError, match=r"extra2 is in \S+ alone \(and 2 more\)\.$"):
        gather_checkpoints(paths, tmp_path / "all.pth")


def test_layers_of_other_numbers_of_ranks_have_no_number_in_common(tmp_path: Path) -> None:
    two, four = (
        {f"{name}.{key}": torch.ones(ranks, 3) for key in ("running_mean", "running_var")}
        for name, ranks in (("a", 2), ("b", 4))
    )
    paths = [save(tmp_path, two | four, f"rank{rank}.pth") for rank in range(2)]
    report = gather_checkpoints(paths, tmp_path / "all.pth")
    assert report.virtual_ranks is None
    assert {group.ranks for group in report.groups} == {2, 4}


def test_safetensors_of_ranks_are_gathered_too(tmp_path: Path, capsys: Any) -> None:
    names = []
    for path in rank_files(tmp_path, 2):
        names.append(path.with_suffix(".safetensors"))
        save_file(load(path)["model"], names[-1])
    done = run_cli(capsys, "gather", *names, tmp_path / "all.safetensors", "--json")
    assert done.code == 0, done.err
    assert done.json["virtual_ranks"] == 2
    assert done.json["counts"] == {"gathered": BATCH_NORMS}


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_are_gathered_whatever_their_formats_and_orders(tmp_path: Path, first: int) -> None:
    state = bn_state() | {key.replace("bn.", "a."): value for key, value in bn_state().items()}
    state["a.weight"] = nn.Parameter(state["a.weight"])
    shuffled = {key: state[key].detach() for key in reversed(state)}
    save_file(shuffled, tmp_path / "rank1")
    paths = [save(tmp_path, state, "rank0"), tmp_path / "rank1"]
    report = gather_checkpoints([paths[first], paths[1 - first]], tmp_path / "all", format="torch")
    assert report.virtual_ranks == 2
    assert torch.equal(load(tmp_path / "all")["a.running_mean"][1], state["a.running_mean"])
    reordered = save(tmp_path, {key: state[key] for key in reversed(state)}, "rank2")
    report = gather_checkpoints([paths[0], reordered], tmp_path / "both")
    told = "differs from the first file in its keys; the first file's were taken."
    assert report.warnings == (f"{reordered} {told}",)


def test_a_file_with_batch_norms_elsewhere_is_not_of_the_run(tmp_path: Path) -> None:
    one = save(tmp_path, {"model": bn_state()}, "one")
    two = save(tmp_path, {"model": load(one)["model"], "ema": bn_state()}, "two")
    with pytest.raises(ReadError, match=r"ema\.bn is in \S+two alone\.$"):
        gather_checkpoints([one, two], tmp_path / "all")


def test_case_40_a_dtensor_statistic_is_refused_and_another_dtensor_passes(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        state: dict[str, Any] = dict(nn.BatchNorm1d(3).state_dict(prefix="bn."))
        state["fc.weight"] = distribute_tensor(torch.rand(2, 3), mesh, [Replicate()])
        torch.save(state, tmp_path / "weights.pth")
        state["bn.running_mean"] = distribute_tensor(torch.rand(3), mesh, [Replicate()])
        torch.save(state, tmp_path / "stats.pth")
        expected = (tmp_path / "weights.pth").read_bytes()
        convert_checkpoint(tmp_path / "weights.pth", tmp_path / "v.pth", 2)
        revert_checkpoint(tmp_path / "v.pth", tmp_path / "back.pth")
        back = load(tmp_path / "back.pth")
        assert type(back["fc.weight"]).__name__ == "DTensor"
        assert torch.equal(back["fc.weight"].to_local(), state["fc.weight"].to_local())
        assert (tmp_path / "weights.pth").read_bytes() == expected
        with pytest.raises(RefusedError, match=r"statistic of bn is a DTensor"):
            convert_checkpoint(tmp_path / "stats.pth", tmp_path / "o.pth", 2)
    finally:
        dist.destroy_process_group()


@pytest.fixture
def virtual(tmp_path: Path) -> Path:
    gather_checkpoints(rank_files(tmp_path), tmp_path / "virtual.pth")
    return tmp_path / "virtual.pth"


def test_the_plot_names_every_layer_and_its_numbers(virtual: Path, capsys: Any) -> None:
    svg = virtual.with_name("spread.svg")
    assert run_cli(capsys, "inspect", virtual, "--plot", svg).code == 0
    text = " ".join(texts(svg))
    for label in ("conv1_BN  [5]", "downsample.1  [5]", "head  [4]", "running_mean", "running_var"):
        assert label in text
    assert "virtual.pth: how far 3 virtual ranks disagree in 3 BatchNorm layers" in text
    spreads = [group.spread for group in inspect_checkpoint(virtual).groups if group.spread]
    assert f"{max(spread.mean_max for spread in spreads):.2g}" in text
    assert f"{100 * max(spread.var_max for spread in spreads):.2g} %" in text


def test_the_plot_comes_as_a_picture_and_as_a_page(virtual: Path) -> None:
    report = inspect_checkpoint(virtual)
    plot_spread(report, virtual.with_name("spread.png"))
    png = virtual.with_name("spread.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000
    plot_spread(report, virtual.with_name("spread.html"))
    page = virtual.with_name("spread.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "<svg" in page
    assert "</html>" in page
    plot_spread(report, virtual.with_name("again.html"))
    assert virtual.with_name("again.html").read_text() == page


def test_a_plot_needs_virtual_ranks_and_a_known_ending(virtual: Path) -> None:
    report = inspect_checkpoint(virtual)
    with pytest.raises(ConfigurationError, match=r"\*\.png"):
        plot_spread(report, virtual)
    plain = inspect_checkpoint(virtual.with_name("rank0.pth"))
    with pytest.raises(NothingToDoError, match="no virtual ranks to compare"):
        plot_spread(plain, virtual.with_name("p.png"))


def texts(svg: Path) -> list[str]:
    return [element.text for element in ElementTree.parse(svg).iter() if element.text]


NAMES = {
    "<b>&$\\frac{a}$": "<b>&$\\frac{a}$  [2]",
    "bell\x07\nbn": "bell\ufffd\ufffdbn  [2]",
    "名前": "名前  [2]",
    "a" * 40 + "." + "b" * 40: "a" * 24 + "…" + "b" * 24 + "  [2]",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_plot_shows_any_name_as_text(tmp_path: Path, name: str) -> None:
    state = {f"{name}.running_mean": torch.rand(3, 2), f"{name}.running_var": torch.rand(3, 2)}
    torch.save(state, tmp_path / "a$x^$<i>.pth")
    report = inspect_checkpoint(tmp_path / "a$x^$<i>.pth")
    for ending in ("svg", "png", "html"):
        plot_spread(report, tmp_path / f"spread.{ending}")
    shown = texts(tmp_path / "spread.svg")
    assert NAMES[name] in [text.strip() for text in shown]
    title = "a$x^$<i>.pth: how far 3 virtual ranks disagree in 1 BatchNorm layer"
    assert title in shown
    assert f"<title>{escape(title)}</title>" in (tmp_path / "spread.html").read_text("utf-8")


def test_a_plot_shows_the_order_of_the_file_from_top_to_bottom(tmp_path: Path) -> None:
    layers = [f"{bn}.running_{what}" for bn in ("b", "a") for what in ("mean", "var")]
    states = {name: {key: torch.rand(3, 2) for key in layers} for name in ("model", "ema")}
    torch.save(states, tmp_path / "in.pth")
    plot_spread(inspect_checkpoint(tmp_path / "in.pth"), tmp_path / "spread.svg")
    drawn = ElementTree.parse(tmp_path / "spread.svg").iter()
    rows = [(float(e.attrib["y"]), e.text.strip()) for e in drawn if "[2]" in (e.text or "")]
    assert [name for _, name in sorted(rows)] == [
        f"{name}  [2]" for name in ("model.b", "model.a", "ema.b", "ema.a")
    ]


def test_a_plot_counts_the_layers_that_it_shows_and_writes_numbers_out(tmp_path: Path) -> None:
    state = dict(nn.BatchNorm1d(1).state_dict(prefix="plain."))
    for name, mean in (("a", [0.0, 2e4]), ("b", [0.0, 2.0])):
        state[f"{name}.running_mean"] = torch.tensor(mean).view(2, 1)
        state[f"{name}.running_var"] = torch.ones(2, 1)
    infinite = torch.tensor([[1.7e308], [-1.7e308]], dtype=torch.float64)
    state |= {"c.running_mean": infinite, "c.running_var": torch.ones(2, 1, dtype=torch.float64)}
    torch.save(state, tmp_path / "in.pth")
    for ending in ("svg", "html"):
        plot_spread(inspect_checkpoint(tmp_path / "in.pth"), tmp_path / f"spread.{ending}")
        text = (tmp_path / f"spread.{ending}").read_text("utf-8")
        assert "disagree in 2 BatchNorm layers" in text
    shown = texts(tmp_path / "spread.svg")
    assert {"10,000", "1", "layer  [channels]"} <= {text.strip() for text in shown}
    assert not any("e+" in text for text in shown)
