"""Inputs of mixtures of experts: no near-ties where experts are chosen, weights on their grids, outputs of order 1."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import small_moe
import torch
from small_moe import FP4, FP4_ONE, GROUPS, NAMES, NO_GROUPS, PER_TENSOR, RENORM, ROUTED, ROUTED_ONE

from refgrid.dataset.case import size_of
from refgrid.dataset.definition import Definition, DefinitionError, load_dataset
from refgrid.proving.inputs import Inputs, drawing, make_inputs, moe, plain
from refgrid_groundtruth.quantised import pack_mxfp4, unpack_mxfp4

BY_LOGITS = [name for name in NAMES if "routed" not in name]


@pytest.fixture(autouse=True)
def _no_weights_kept() -> Iterator[None]:
    drawing._kept.clear()
    yield
    drawing._kept.clear()


def make(of: Definition, tokens: int = 200, uuid: str = "w", offset: int = 4) -> Inputs:
    return make_inputs(of, small_moe.workload(of, tokens, uuid, offset), 0, "cpu", None)


def tensor(made: Inputs, name: str) -> torch.Tensor:
    value = made.tensors[name]
    assert isinstance(value, torch.Tensor)
    return value


def biased(made: Inputs) -> torch.Tensor:
    """What DeepSeek's routing chooses by, float64."""
    return tensor(made, "routing_logits").double().sigmoid() + tensor(made, "routing_bias").double()


def unpacked(made: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    ids = tensor(made, "topk_ids")
    return ids >> 16, (ids & 0xFFFF).short().view(torch.bfloat16).double()


def best_of(made: Inputs) -> torch.Tensor:
    """Every token's first choice; of packed ids, the experts of every token."""
    if "topk_ids" in made.tensors:
        return unpacked(made)[0]
    logits = biased(made) if "routed_scaling_factor" in made.tensors else tensor(made, "routing_logits").double()
    return logits.argmax(dim=1, keepdim=True)


class TestRouting:
    @pytest.mark.parametrize("experts", [2, 3, 16, 64, 128, 160])
    @pytest.mark.parametrize("name", [RENORM, FP4_ONE])
    def test_logits_of_a_row_are_apart_by_more_than_a_bfloat16_can_lose(self, name: str, experts: int) -> None:
        of = small_moe.definition(name, num_experts=experts, num_local_experts=experts)
        logits = tensor(make(replace(of, constraints=())), "routing_logits")

        gaps = logits.double().sort(dim=1).values.diff(dim=1)
        assert logits.shape == (200, experts)
        assert gaps.min() >= 1 / 32
        assert torch.unique(gaps).numel() == 1

    def test_logits_that_the_dtype_cannot_hold_apart_are_an_error(self) -> None:
        with pytest.raises(DefinitionError, match=r"512 numbers well apart, which torch\.bfloat16 cannot hold"):
            make(small_moe.definition(RENORM, num_local_experts=512))

    @pytest.mark.parametrize(("name", "experts"), [(GROUPS, 16), (GROUPS, 256), (NO_GROUPS, 9), (NO_GROUPS, 384)])
    def test_deepseeks_biased_scores_are_apart(self, name: str, experts: int) -> None:
        made = make(small_moe.definition(name, num_experts=experts, num_local_experts=5))

        assert biased(made).sort(dim=1).values.diff(dim=1).min() > 0.9 / 1024
        assert tensor(made, "routing_logits").isfinite().all()
        assert biased(made).min() > 0  # a kernel that puts 0 for what is out of the choice is not caught unfairly

    @pytest.mark.parametrize("experts", [16, 32, 256])
    def test_deepseeks_groups_do_not_tie_at_the_cut(self, experts: int) -> None:
        made = make(small_moe.definition(GROUPS, num_experts=experts), tokens=2000)

        sums = biased(made).unflatten(1, (8, -1)).topk(2, dim=2).values.sum(dim=2).sort(dim=1).values
        assert (sums[:, 4] - sums[:, 3]).min() > 0.9 / 1024

    def test_deepseeks_bias_changes_choices_and_not_all(self) -> None:
        made = make(small_moe.definition(NO_GROUPS, num_experts=384), tokens=500)

        with_bias = biased(made).topk(8, dim=1).indices
        without = tensor(made, "routing_logits").topk(8, dim=1).indices
        share = (with_bias[:, None] == without[:, :, None]).any(dim=2).double().mean()
        assert 0.2 < share < 0.9

    @pytest.mark.parametrize("name", BY_LOGITS)
    def test_some_rows_are_all_negative_and_others_are_not(self, name: str) -> None:
        negative = (tensor(make(small_moe.definition(name)), "routing_logits") < 0).all(dim=1)

        assert 0.05 < negative.double().mean() < 0.95

    @pytest.mark.parametrize("name", BY_LOGITS)
    def test_all_rows_are_negative_where_the_workload_says_so(self, name: str) -> None:
        assert (tensor(make(small_moe.definition(name), uuid="edge_t13_negative"), "routing_logits") < 0).all()

    @pytest.mark.parametrize("name", NAMES)
    def test_one_expert_is_chosen_by_all_where_the_workload_says_so(self, name: str) -> None:
        best = best_of(make(small_moe.definition(name), uuid="edge_t17_one_expert"))

        shared = set.intersection(*(set(row) for row in best.tolist()))
        assert len(shared) == 1 if best.shape[1] == 1 else shared

    @pytest.mark.parametrize("name", [GROUPS, NO_GROUPS])
    def test_that_expert_is_here_and_its_group_stays_in(self, name: str) -> None:
        of = small_moe.definition(name, num_local_experts=4)
        made = make(of, uuid="one_expert", offset=20)

        best = best_of(made)
        assert 20 <= int(best[0]) < 24
        groups = biased(made).unflatten(1, (8, -1)).topk(2, dim=2).values.sum(dim=2).topk(4, dim=1).indices
        assert (groups == best // 4).any(dim=1).all()

    @pytest.mark.parametrize("name", [GROUPS, NO_GROUPS])
    def test_no_expert_that_is_here_is_among_the_best_where_the_workload_says_so(self, name: str) -> None:
        made = make(small_moe.definition(name, num_local_experts=4), uuid="edge_t5_elsewhere", offset=8)

        score = biased(made)
        assert (score[:, 8:12].amax(dim=1) < torch.cat((score[:, :8], score[:, 12:]), dim=1).amin(dim=1)).all()

    @pytest.mark.parametrize("name", [RENORM, NO_GROUPS, FP4])
    def test_one_expert_gets_no_token_and_both_ends_do(self, name: str) -> None:
        made = make(small_moe.definition(name), tokens=2000, offset=4)

        of = small_moe.definition(name)
        experts = tensor(made, "routing_logits").shape[1]
        score = biased(made) if name == NO_GROUPS else tensor(made, "routing_logits").double()
        chosen = score.topk(int(of.constant("top_k")), dim=1).indices
        first = 4 if name == NO_GROUPS else 0
        count = torch.bincount(chosen.flatten(), minlength=experts)
        assert (count == 0).sum() == 1
        assert int(best_of(made)[0]) == first
        here = of.constant("num_local_experts" if "num_local_experts" in of.axes else "num_experts")
        assert int(best_of(made)[1]) == first + here - 1

    def test_experts_that_cannot_be_here_are_an_error(self) -> None:
        of = replace(small_moe.definition(GROUPS), constraints=())

        with pytest.raises(DefinitionError, match=r"32 experts, of which \[30, 42\) cannot be here"):
            make(of, offset=30)


class TestPackedIds:
    @pytest.mark.parametrize("name", [ROUTED, ROUTED_ONE])
    def test_experts_of_a_token_are_distinct_and_all_are_used(self, name: str) -> None:
        expert, _ = unpacked(make(small_moe.definition(name), tokens=2000))

        assert (expert.sort(dim=1).values.diff(dim=1) > 0).all()
        assert (expert.min(), expert.max()) == (0, 31)
        assert 0 in expert[0]
        assert 31 in expert[1]
        assert len(set(expert.flatten().tolist())) >= 31

    def test_they_are_in_no_order(self) -> None:
        expert, weight = unpacked(make(small_moe.definition(ROUTED)))

        for given in (expert, weight):
            assert not torch.equal(given, given.sort(dim=1).values)
            assert not torch.equal(given, given.sort(dim=1, descending=True).values)

    @pytest.mark.parametrize("name", [ROUTED, ROUTED_ONE])
    def test_weights_are_positive_and_their_sum_a_little_below_one(self, name: str) -> None:
        _, weight = unpacked(make(small_moe.definition(name)))

        assert weight.min() > 0
        assert 0.1 <= weight.sum(dim=1).min() < weight.sum(dim=1).max() < 1.02
        assert weight.sum(dim=1).mean() < 0.97


class TestWeights:
    @pytest.mark.parametrize("name", NAMES)
    def test_fp8_holds_no_nan_and_is_used_over_its_range(self, name: str) -> None:
        made = make(small_moe.definition(name))
        for each, value in made.tensors.items():
            if isinstance(value, torch.Tensor) and value.dtype == torch.float8_e4m3fn:
                assert not value.float().isnan().any(), each
                assert 300 < value.float().abs().max() <= 448, each

    @pytest.mark.parametrize("name", NAMES)
    def test_scales_are_positive_and_spread(self, name: str) -> None:
        made = make(small_moe.definition(name))
        for each, value in made.tensors.items():
            if isinstance(value, torch.Tensor) and "scale" in each:
                assert value.min() > 0, each
                assert 1.5 < value.max() / value.min() <= 3, each

    @pytest.mark.parametrize("name", [FP4, FP4_ONE, ROUTED])
    @pytest.mark.parametrize("period", [moe.MXFP4_PERIOD, 31])
    def test_fp4_weights_are_packed_without_loss(self, monkeypatch: pytest.MonkeyPatch, name: str, period: int) -> None:
        monkeypatch.setattr(moe, "MXFP4_PERIOD", period)
        made = make(small_moe.definition(name))
        for each in ("gemm1_weights", "gemm2_weights"):
            weight = tensor(made, each)
            assert torch.equal(unpack_mxfp4(*pack_mxfp4(weight)), weight)
            assert torch.unique(pack_mxfp4(weight)[0]).numel() > 100
            assert torch.unique(pack_mxfp4(weight)[1]).numel() >= 3

    def test_a_large_fp4_weight_repeats_whole_blocks_and_no_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(moe, "MXFP4_PERIOD", 1009)
        weight = tensor(make(small_moe.definition(FP4, num_experts=8)), "gemm1_weights")

        flat = weight.flatten()
        assert torch.equal(flat[1009 * 32 : 2 * 1009 * 32], flat[: 1009 * 32])
        assert len({tuple(row) for row in weight[:, :, :32].flatten(0, 1)[:1009].tolist()}) > 900
        assert not torch.equal(weight[0], weight[1])

    def test_a_large_fp8_weight_repeats_itself_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plain, "PERIOD", 10007)
        weight = tensor(make(small_moe.definition(RENORM)), "gemm1_weights").float()

        assert torch.equal(weight.flatten()[10007 : 2 * 10007], weight.flatten()[:10007])
        assert not torch.equal(weight[0], weight[1])

    def test_the_large_ones_differ_in_their_hash_by_their_shape(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(moe, "MXFP4_PERIOD", 7)
        hashes = {make(small_moe.definition(FP4, num_experts=n), tokens=1).hash for n in (8, 16, 24)}

        assert len(hashes) == 3

    def test_rows_that_are_no_whole_blocks_are_an_error(self) -> None:
        of = replace(small_moe.definition(FP4, hidden_size=48), constraints=())

        with pytest.raises(DefinitionError, match="rows of 48, which is no multiple of 32"):
            make(of)

    def test_an_intermediate_times_its_scale_fits_fp8(self) -> None:
        made = make(small_moe.definition(PER_TENSOR, hidden_size=2048))
        x, w = tensor(made, "hidden_states").double(), tensor(made, "gemm1_weights")
        for e in range(4):
            up, gate = (x @ w[e].double().T).chunk(2, dim=1)
            up, gate = (
                up * tensor(made, "output1_scales_scalar")[e],
                gate * tensor(made, "output1_scales_gate_scalar")[e],
            )
            assert 10 < (up * gate / (1 + torch.exp(-gate))).abs().max() < 448

    def test_the_three_scalars_fold_one_scale_of_the_intermediate(self) -> None:
        made = make(small_moe.definition(PER_TENSOR))

        ratio = tensor(made, "output1_scales_scalar") / tensor(made, "output1_scales_gate_scalar")
        assert torch.equal(ratio, torch.full_like(ratio, moe.INTERMEDIATE))

    def test_kept_or_drawn_the_dependent_scale_is_the_same(self) -> None:
        of = small_moe.definition(PER_TENSOR)
        make(of, tokens=5)
        kept = make(of, tokens=2)
        drawing._kept.clear()
        fresh = make(of, tokens=2)

        assert kept.hash == fresh.hash
        assert torch.equal(tensor(kept, "output1_scales_scalar"), tensor(fresh, "output1_scales_scalar"))


class TestTheSameEverywhere:
    ONCE = {  # noqa: RUF012 - a constant: what was once drawn at 13 tokens
        small_moe.GROUPS: "8d1e5d9792a9b06cc37eea9e40c0fe11",
        small_moe.NO_GROUPS: "218ce57842308b3f843f58f94c9dc6e5",
        small_moe.RENORM: "3d40e357f002f6866bd67243175536ad",
        small_moe.PER_TENSOR: "bed45e3ce6299fff772c1341d4fd56a1",
        small_moe.PER_TENSOR_ONE: "20b180f22d2cba42c9a9e1bf407835d0",
        small_moe.FP4: "cbeff07b1da512987272ce059ffc5ab7",
        small_moe.FP4_ONE: "37b230c49c3ef03906fa5b850b87c8d1",
        small_moe.ROUTED: "b9bb456b99d7d93f51f135a6c04be906",
        small_moe.ROUTED_ONE: "f37eb293f4a89b88caa8ae54a0d171d9",
    }

    @pytest.mark.parametrize("name", NAMES)
    def test_numbers_that_were_once_drawn(self, name: str) -> None:
        assert make(small_moe.definition(name), tokens=13).hash == self.ONCE[name]


class TestWorkloads:
    def test_every_definition_has_small_ones_edges_and_a_large_one(self) -> None:
        dataset = load_dataset(small_moe.ROOT)
        names = [name for name, of in dataset.definitions.items() if of.op_type == "moe"]
        assert len(names) == 19
        for name in names:
            sizes = [size_of(dataset.definitions[name], each) for each in dataset.workloads[name]]
            assert sizes.count("small") >= 4, name
            assert set(sizes) - {"small"}, name
            edges = [each.uuid for each in dataset.workloads[name] if each.uuid.startswith("edge_")]
            assert 5 <= len(edges) <= 8, name
            assert any("one_expert" in uuid for uuid in edges), name

    def test_the_tokens_stand_in_the_name(self) -> None:
        dataset = load_dataset(small_moe.ROOT)
        all_of = {name: dataset.workloads[name] for name, of in dataset.definitions.items() if of.op_type == "moe"}
        for each in (each for workloads in all_of.values() for each in workloads):
            found = re.match(r"(edge_)?t(\d+)(_|$)", each.uuid)
            assert found is not None, each.uuid
            assert int(found[2]) == each.axes["seq_len"]
