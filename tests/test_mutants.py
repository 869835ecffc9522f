"""The command that plants mutants: what it refuses, what makes it fail, and what the documents' checks do not see."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from guards import ROOT, AtOnce, Here, bench_of, published, table

import refgrid_groundtruth
from refgrid.cli import main as refgrid
from refgrid.commands.mutants import mutants as main
from refgrid.mutants import baseline
from refgrid.mutants.judging import roundings
from refgrid.mutants.planting import planted_adapters, self_test
from refgrid.mutants.running import run
from refgrid.mutants.table import Mutant, MutantError, load_mutants
from refgrid.proving.settings import read_settings

Write = Callable[..., Path]

PLACE = '[places.norm]\ndefinition = "rmsnorm_h128"\nworkload = "edge_b5_quiet"\nsource = "torch"\n'
FEW = ('"edge_b5_quiet"', '"b2528"')  # a small workload and one of medium size
EPS = {"name": "eps tenfold", "at": "norm", "sound": "eps=1e-06", "broken": "eps=1e-05", "told": "output is off"}
NORMS = "refgrid_groundtruth.torch.norm"
PLUS = {"name": "weight plus one", "at": "norm", "before": "weight = weight + 1", "told": "output is off"}
DIVIDED = {"sound": "torch.rsqrt(mean_square + eps)", "broken": "(mean_square + eps) ** -0.5"}


@pytest.fixture(autouse=True)
def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refgrid.mutants.running.Worker", Here)
    monkeypatch.setattr("refgrid.mutants.workers.ThreadPoolExecutor", AtOnce)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A data set of one norm, with the mutants that are given."""

    def written(*mutants: dict[str, str], without: str = "", places: str = PLACE, few: bool = False) -> Path:
        for kind, end in (("definitions", "json"), ("workloads", "jsonl")):
            file = tmp_path / kind / "rmsnorm" / f"rmsnorm_h128.{end}"
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = (ROOT / kind / "rmsnorm" / file.name).read_text().splitlines()
            wanted = (line for line in lines if not without or without not in line)
            few_of = (line for line in wanted if not few or end == "json" or any(each in line for each in FEW))
            file.write_text("\n".join(few_of))
        (tmp_path / "mutants").mkdir(exist_ok=True)
        entries = "".join(
            "\n[[mutants]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in mutant.items())
            for mutant in mutants
        )
        (tmp_path / "mutants" / "rmsnorm.toml").write_text(places + entries)
        return tmp_path

    return written


def command(root: Path, *options: str) -> Result:
    return CliRunner().invoke(main, [f"--dataset={root}", *options], env={"COLUMNS": "200"}, catch_exceptions=False)


def test_a_mutant_that_is_caught_is_written_with_its_verdicts_and_the_command_succeeds(write: Write) -> None:
    root = write(EPS)

    done = command(root, f"--output={root / 'out'}")

    assert done.exit_code == 0, done.output
    assert "caught 1 of 1" in done.output
    data = json.loads((root / "out" / "mutants.json").read_text())
    (told,) = (one["verdicts"][0] for one in data["mutants"])
    seen = told["workloads"]["edge_b5_quiet"]
    assert (told["device"], told["size"], told["fate"]) == ("cpu", "small", "caught")
    assert (seen["fate"], seen["verdict"], seen["against"]) == ("caught", "mismatch", "torch")
    assert told["workloads"]["edge_b13"]["fate"] in ("same", "rounding")  # a row of unit variance hides it
    assert "| rmsnorm: eps tenfold |" in (root / "out" / "mutants.md").read_text()


def test_a_run_on_a_gpu_is_refused_where_there_is_none(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    done = command(write(EPS), "--device=cuda")

    assert done.exit_code == 2
    assert "--device cuda: torch sees no GPU" in done.output


def test_a_second_run_keeps_the_mutants_that_it_did_not_judge(write: Write) -> None:
    root = write(EPS, PLUS, without="quiet", places=PLACE.replace("edge_b5_quiet", "edge_b13"))
    kept = root / "out" / "mutants.json"
    command(root, f"--output={root / 'out'}", "--only=*eps*")
    first = json.loads(kept.read_text())

    done = command(root, f"--output={root / 'out'}", "--only=*plus*")

    both = json.loads(kept.read_text())
    assert done.exit_code == 0, done.output
    assert both["mutants"][0] == first["mutants"][0]
    assert [one["verdicts"][0]["fate"] for one in both["mutants"]] == ["survived", "caught"]
    assert both["exit_code"] == 1


def edit(root: Path, kind: str, old: str, new: str) -> None:
    (file,) = (root / kind / "rmsnorm").iterdir()
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_what_nothing_has_changed_of_is_not_planted_again(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(*_: object) -> None:
        raise RuntimeError("something was planted")

    root = write(EPS, PLUS, few=True)
    first = command(root, f"--output={root / 'out'}")
    kept = (root / "out" / "mutants.json").read_bytes()
    monkeypatch.setattr("refgrid.mutants.running.judged", planted)

    again = command(root, f"--output={root / 'out'}")

    assert again.exit_code == first.exit_code == 0, again.output
    assert "caught 2 of 2" in again.output
    assert (root / "out" / "mutants.json").read_bytes() == kept
    with pytest.raises(RuntimeError, match="something was planted"):
        command(root, f"--output={root / 'out'}", "--again")


def test_a_mutant_whose_reference_has_changed_is_planted_again(write: Write) -> None:
    root, file = write(EPS, PLUS, few=True), Path("out", "mutants.json")
    command(root, f"--output={root / 'out'}")
    before = json.loads((root / file).read_text())
    edit(root, "definitions", "def run(", "# another text\\ndef run(")

    command(root, f"--output={root / 'out'}", "--only=*eps*")

    eps, plus = json.loads((root / file).read_text())["mutants"]
    old_eps, old_plus = before["mutants"]
    assert plus == old_plus, "not asked for"
    assert eps["verdicts"][0]["parts"]["reference"] != old_eps["verdicts"][0]["parts"]["reference"]
    assert json.loads((root / file).read_text())["older"] == {"reference": 1}
    assert "- 1 verdicts are of another reference than today's" in (root / "out" / "mutants.md").read_text()


def test_each_size_has_a_verdict_of_its_own_and_a_run_at_one_keeps_the_other(write: Write) -> None:
    root = write(PLUS, few=True)
    command(root, f"--output={root / 'out'}")

    done = command(root, f"--output={root / 'out'}", "--sizes=small,medium")

    (mutant,) = json.loads((root / "out" / "mutants.json").read_text())["mutants"]
    assert [(one["size"], one["run"]) for one in mutant["verdicts"]] == [("small", 0), ("medium", 1)], done.output
    assert "| planted in | cpu small | cpu medium |" in (root / "out" / "mutants.md").read_text()


def test_at_a_larger_size_a_mutant_is_planted_until_it_is_caught_and_documents_are_not_asked(write: Write) -> None:
    root = write(PLUS, {"name": "power of -0.5", "at": "norm", **DIVIDED, "equivalent": "the same number"})

    done = command(root, f"--output={root / 'out'}", "--sizes=small,medium", "--workloads=2")

    plus, power = json.loads((root / "out" / "mutants.json").read_text())["mutants"]
    small, medium = plus["verdicts"]
    assert len(small["workloads"]) == 13, done.output
    assert [list(each["verdicts"][1]["workloads"]) for each in (plus, power)] == [["b2528"], ["b2528", "b49532"]]
    assert (small["fixed"]["document 1"], medium["fixed"]) == (True, {})
    assert "cpu medium: caught 1 of 1, 1 equivalent\n" in done.output


def test_what_is_kept_is_written_anew_without_a_library_or_a_gpu(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    root = write(PLUS, few=True)
    folder = f"--output={root / 'out'}"
    command(root, folder)
    before = json.loads((root / "out" / "mutants.json").read_text())
    edit(root, "definitions", "def run(", "# another text\\ndef run(")
    write(PLUS, EPS, few=True)
    edit(root, "definitions", "def run(", "# another text\\ndef run(")

    done = command(root, folder, "--restate", "--device=cuda")

    after = json.loads((root / "out" / "mutants.json").read_text())
    assert done.exit_code == 2, "nothing is known of a GPU"
    assert after["mutants"] == before["mutants"]
    assert (after["waiting"], after["outdated"]) == (["rmsnorm: eps tenfold"], ["rmsnorm: weight plus one (cpu small)"])
    assert "--restate: of what? --output names no folder" in command(root, "--restate").output


def test_what_was_done_before_the_end_is_kept(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(PLUS, few=True)

    def killed(todo: Any, *_: Any) -> Any:
        yield from run(todo[:-1], 1, 600)
        raise KeyboardInterrupt

    monkeypatch.setattr("refgrid.mutants.campaign.run", killed)

    assert command(root, f"--output={root / 'out'}", "--sizes=small,medium").exit_code == 1

    (mutant,) = json.loads((root / "out" / "mutants.json").read_text())["mutants"]
    assert [one["size"] for one in mutant["verdicts"]] == ["small"], "medium was not done"


def test_it_is_a_command_of_refgrid() -> None:
    done = CliRunner().invoke(refgrid, ["mutants", "--help"])

    assert done.exit_code == 0
    assert "Plant faults into references and adapters" in done.output


def test_a_file_that_is_no_report_is_refused_before_the_work(write: Write) -> None:
    root = write(EPS)
    (root / "mutants.json").write_text("{}")

    done = command(root, f"--output={root}")

    assert done.exit_code == 2
    assert "mutants.json: is no report that this version can add to (KeyError: 'runs'); move it away" in done.output
    assert (root / "mutants.json").read_text() == "{}"


def test_a_survivor_makes_the_command_fail_and_is_named(write: Write) -> None:
    root = write(EPS, places=PLACE.replace("edge_b5_quiet", "edge_b13"), without="quiet")

    done = command(root)

    assert done.exit_code == 1
    assert "survived, cpu small: rmsnorm: eps tenfold" in done.output
    assert "caught 0 of 1" in done.output


def test_an_equivalent_mutant_that_is_seen_makes_the_command_fail(write: Write) -> None:
    without_told = {key: value for key, value in EPS.items() if key != "told"}

    done = command(write({**without_told, "equivalent": "eps is small"}))

    assert done.exit_code == 1
    assert "seen, cpu small: rmsnorm: eps tenfold" in done.output


def test_an_equivalent_mutant_counts_neither_as_caught_nor_as_survived(write: Write) -> None:
    divided = {"name": "power of -0.5", "at": "norm", **DIVIDED, "equivalent": "the same number"}

    done = command(write(EPS, divided))

    assert done.exit_code == 0, done.output
    assert "caught 1 of 1, 1 equivalent" in done.output


def test_mutants_of_another_device_are_told_and_not_run(write: Write) -> None:
    place = PLACE + PLACE.replace("norm]", "kernel]").replace("torch", "flashinfer")
    kernel = {"adapter": "refgrid_groundtruth.flashinfer.norm", "sound": "weight, eps)}", "broken": "eps, weight)}"}
    gpu = {"name": "weight and eps", "at": "kernel", "told": "off", "device": "cuda", **kernel}

    both = command(write(EPS, gpu, places=place)).output
    assert "caught 1 of 1;" in both
    assert "1 for another device" in both
    alone = command(write(gpu, places=place))
    assert alone.exit_code == 2
    assert "nothing was planted" in alone.output


@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param({"sound": "eps=7"}, "'eps=7' is not in the reference of rmsnorm_h128", id="text"),
        pytest.param(
            {"sound": "same", "broken": "same"}, "changes nothing: sound and broken are both 'same'", id="same"
        ),
        pytest.param({"at": "nowhere"}, "at = 'nowhere', but should be one of norm", id="place"),
        pytest.param({"told": ""}, "says either what the reason tells of it, or why it is equivalent", id="told"),
        pytest.param({"told": "("}, "'(' is no regular expression", id="expression"),
        pytest.param({"before": "pass"}, "says either sound and broken, or before and after", id="two faults"),
        pytest.param({"verdict": "match"}, "verdict = match, but should be a red one", id="green"),
        pytest.param({"colour": "red"}, "colour: Extra inputs are not permitted", id="field"),
        pytest.param(
            {"adapter": "refgrid_groundtruth.torch.norm"},
            "'eps=1e-06' is not in refgrid_groundtruth.torch.norm",
            id="adapter",
        ),
        pytest.param({"adapter": "refgrid_groundtruth.nothing"}, "there is no such module", id="module"),
    ],
)
def test_a_mutant_that_cannot_be_planted_is_refused_with_file_name_and_text(
    write: Write, change: dict[str, str], told: str
) -> None:
    done = command(write({**EPS, **change}))

    assert done.exit_code == 2
    assert "mutants/rmsnorm.toml: mutant 'eps tenfold'" in done.output
    assert told in done.output


def test_a_place_that_is_not_in_the_data_set_is_refused(write: Write) -> None:
    other = command(write(EPS, places=PLACE.replace("h128", "h4")))
    size = command(write(EPS, places=PLACE.replace("edge_b5_quiet", "edge_b5")))

    assert "definition = 'rmsnorm_h4', but the data set has none of that name" in other.output
    assert "workload = 'edge_b5', but rmsnorm_h128 has none of that name" in size.output


@pytest.mark.parametrize(
    ("second", "told"),
    [
        pytest.param(EPS, "stands there twice", id="name"),
        pytest.param({**EPS, "name": "other"}, "is the same fault as 'eps tenfold'", id="fault"),
    ],
)
def test_no_mutant_stands_in_the_table_twice(write: Write, second: dict[str, str], told: str) -> None:
    with pytest.raises(MutantError, match=told):
        load_mutants(write(EPS, second) / "mutants")


def test_a_folder_without_a_table_and_a_glob_that_fits_nothing_are_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(MutantError, match="holds no table of mutants"):
        load_mutants(tmp_path)
    assert (
        "--only gemm*: fits none of 1 mutants, such as 'rmsnorm: eps tenfold'"
        in command(write(EPS), "--only=gemm*").output
    )


def test_every_op_type_has_mutants_and_there_are_far_more_than_asked_for() -> None:
    found = {mutant.op_type for mutant in table().values()}

    assert found == {definition.op_type for definition in published().definitions.values()}
    assert len(table()) >= 150


def _adapter_mutant(name: str) -> Mutant:
    return table()[name]


def test_a_faulty_adapter_leaves_the_sound_one_in_place_for_others() -> None:
    mutant = _adapter_mutant("rmsnorm: adapter: weight plus one")
    definition, sound = published().definitions[mutant.where.definition], refgrid_groundtruth.adapter
    x, ones = torch.ones(1, 4), torch.ones(4)

    faulty = planted_adapters(definition, "rmsnorm", mutant)["torch"]

    assert sys.modules["refgrid_groundtruth"].adapter is sound
    assert sound("torch", "rmsnorm", "cpu")(x, ones, eps=0.0)["output"][0, 0] == 1
    assert faulty(x, ones, eps=0.0)["output"][0, 0] == 2
    assert "self-test" in self_test(definition, "rmsnorm", mutant)


def test_the_documents_template_sees_the_first_output_alone_and_85_percent_of_a_quantised_one() -> None:
    fused = published().definitions["fused_add_rmsnorm_h2048"]
    ones, twos = torch.ones(4, 10, dtype=torch.bfloat16), torch.full((4, 10), 2.0, dtype=torch.bfloat16)
    truth, wrong = {"output": ones, "residual_out": ones}, {"output": ones, "residual_out": twos}

    assert baseline.red(wrong, wrong, truth, fused, baseline.BASELINES) == {
        "document 1": True,
        "documents 2 and 3": False,
        "their guideline": True,
    }
    moe = published().definitions["moe_fp8_block_scale_renorm_topk10_e128_h2048_i512"]
    most = ones.clone()
    most[0, :6] = 2  # 85 % are right
    told = baseline.red({"output": most}, {"output": most}, {"output": ones}, moe, baseline.BASELINES)
    assert told == {"document 1": True, "documents 2 and 3": False, "their guideline": False}
    most[0, 6] = 2
    told = baseline.red({"output": most}, {"output": most}, {"output": ones}, moe, baseline.BASELINES)
    assert all(told.values())


@pytest.mark.parametrize("check", baseline.BASELINES)
def test_the_documents_checks_see_shape_dtype_and_a_result_that_is_another_each_time(check: str) -> None:
    norm = published().definitions["rmsnorm_h128"]
    ones = torch.ones(2, 3, dtype=torch.bfloat16)

    def red(reference: torch.Tensor, again: torch.Tensor) -> bool:
        pair = {"output": reference}, {"output": again}
        return baseline.red(*pair, {"output": ones}, norm, baseline.BASELINES)[check]

    assert not red(ones, ones)
    assert red(ones[:1], ones[:1])
    assert red(ones.float(), ones.float())
    assert red(ones, ones + 1)


def test_the_documents_inputs_hide_pages_that_are_read_in_order() -> None:
    mutant = table()["gqa_paged: pages in order"]
    bench, source = bench_of(mutant.where), mutant.where.source

    assert bench.judge(mutant).fate == "caught"
    assert bench.by_documents(source, "laid", mutant)["documents 2 and 3"]
    assert bench.by_documents(source, "plain", mutant) == {"documents 2 and 3, their inputs": False}


def test_a_setting_that_a_fault_changes_does_not_reach_the_next_one() -> None:
    """The documents' checks call what is planted, too, and nothing there says who changed what."""
    mutant = table()["gemm: a setting of torch left changed"]
    bench, before = bench_of(mutant.where), read_settings()

    assert bench.judge(mutant).fate == "caught"
    bench.by_documents(mutant.where.source, "laid", mutant)
    assert read_settings() == before


def test_documents_have_no_check_for_random_samples() -> None:
    mutant = table()["sampling: crossing token dropped"]

    assert bench_of(mutant.where).by_documents(mutant.where.source, "laid", mutant) == {}


def test_a_change_is_counted_in_roundings_of_the_dtype() -> None:
    one = torch.ones(2, 2, dtype=torch.bfloat16)

    assert roundings(one, one) == 0
    assert roundings(one * 1.0078125, one) == 1
    assert roundings(torch.tensor([[1, 2]]), torch.tensor([[1, 3]])) == math.inf
    assert roundings(one / 0, one) == math.inf
    assert roundings(one[:1], one) == math.inf
