"""Serving: the cache, what fits, how fast it is, the network's limit, and a day's account."""

import pytest

from whalefall.errors import UserError
from whalefall.plan.architecture import GroupedAttention
from whalefall.plan.decode import NetworkLimit, decode_step, exchange_seconds, network_limit
from whalefall.plan.hardware import load_hardware
from whalefall.plan.models import architecture_of, model_names
from whalefall.plan.prefill import prefill
from whalefall.plan.serving import Day, Prices, Traffic, plan_serving
from whalefall.plan.unit import Unit, fewest_redundant, kind_of, layer_bytes, token_bytes, variants

V3 = architecture_of("v3-671b")
EXPERTS = V3.mtp_layer.feed_forward


def unit(gpus: int = 1, gpu: str = "h800", model: str = "v3-671b", **changes) -> Unit:
    network = architecture_of(model)
    values = {"weights": "fp8", "redundant": fewest_redundant(network.routed_experts, gpus)}
    return Unit(network, load_hardware(gpu), gpus=gpus, **{**values, **changes})


# Cache


@pytest.mark.parametrize(
    ("model", "size"),
    [("v3-671b", 70_272), ("qwen-2.5-72b", 327_680), ("llama-3.1-405b", 516_096)],
)
def test_bytes_a_token_as_published(model, size):
    assert token_bytes(architecture_of(model)) == size


def test_an_fp8_latent_has_scales_and_a_bf16_key():
    assert layer_bytes(V3.mtp_layer.attention, "fp8") == 512 + 16 + 128 == 656
    assert token_bytes(V3, "fp8") == 61 * 656
    grouped = GroupedAttention(heads=64, kv_heads=8, head_dim=128)
    assert layer_bytes(grouped, "fp8") == 2 * 8 * (128 + 4)


def test_attention_of_all_kinds_side_by_side():
    found = {it.name: it for it in variants(V3)}
    own = variants(V3)[0]
    assert found["MHA"].bytes_per_token / own.bytes_per_token == pytest.approx(56.9, abs=0.05)
    assert found["MHA"].bytes_per_token == 16 * found["GQA of 8"].bytes_per_token
    assert found["MQA"].bytes_per_token == 61 * 2 * 2 * 128
    windowed = next(it for it in found.values() if it.window)
    assert windowed.sequence_bytes(131072) == own.sequence_bytes(4096)
    assert [kind_of(GroupedAttention(8, heads, 64)) for heads in (8, 2, 1)] == [
        "MHA", "GQA of 2", "MQA",
    ]  # fmt: skip


def test_a_window_bounds_a_sequence_and_its_attention():
    whole, windowed = unit(144), unit(144, window=1000)
    assert windowed.sequence_bytes(50_000) == whole.sequence_bytes(1000)
    assert windowed.sequence_bytes(600) == whole.sequence_bytes(600)
    long, short = decode_step(windowed, 16, 50_000), decode_step(whole, 16, 1000)
    assert long.seconds == short.seconds
    assert prefill(windowed, 8000).seconds_per_token < prefill(whole, 8000).seconds_per_token


# Memory


def test_deepseeks_units_hold_what_they_say():
    decode = unit(144)
    assert decode.redundant == 32
    assert decode.slots(EXPERTS) == 2
    assert unit(320).slots(EXPERTS) == 1
    assert unit(32, redundant=32).slots(EXPERTS) == 9
    everything = unit(1).weight_bytes()
    assert sum(everything.values()) == pytest.approx(V3.parameters().total, rel=0.01)
    routed = 58 * 2 * 3 * 7168 * 2048 * (1 + 4 / 128**2)
    assert decode.weight_bytes()["routed experts"] == pytest.approx(routed)


def test_tensor_parallel_groups_share_weights_and_key_heads_but_no_latents():
    one, eight = unit(8, "h200"), unit(8, "h200", tp=8)
    assert eight.sequence_bytes(1000) == one.sequence_bytes(1000)
    assert eight.weight_bytes()["routed experts"] == one.weight_bytes()["routed experts"]
    assert eight.weight_bytes()["dense"] == one.weight_bytes()["dense"] / 8
    whole, half = unit(8, model="qwen-2.5-72b"), unit(8, model="qwen-2.5-72b", tp=2)
    assert half.sequence_bytes(1000) == whole.sequence_bytes(1000) / 2


def test_the_most_sequences_fit_and_one_more_does_not():
    decode = unit(144)
    most = decode.most_sequences(4989)
    assert most > 100
    assert decode.missing(most, 4989) == 0
    assert 0 < decode.missing(most + 1, 4989) <= decode.sequence_bytes(4989)
    fp8 = unit(144, cache="fp8")
    assert fp8.most_sequences(4989) == pytest.approx(most * 1152 / 656, abs=2)


@pytest.mark.parametrize("model", model_names())
def test_every_model_has_a_smallest_unit(model):
    plan = plan_serving(model, gpu="h200")
    assert plan.batch >= 1
    assert plan.unit.missing(plan.batch, plan.context) == 0
    assert plan.decode.seconds > 0
    if plan.unit.gpus > 1:
        with pytest.raises(UserError, match=rf"the nearest that fits one is {plan.unit.gpus} GPUs"):
            plan_serving(model, gpu="h200", gpus=plan.unit.gpus // 2)


# Time


def test_decoding_is_bound_by_weights_with_one_user_and_by_work_with_many():
    alone, many = decode_step(unit(144), 1, 4989), decode_step(unit(144), 128, 4989)
    weights = sum(unit(144).weight_bytes().values())
    assert alone.seconds > (weights - 8e9) / unit(144).hardware.bandwidth
    assert not alone.halves
    assert many.halves
    assert alone.seconds < many.seconds < 128 * alone.seconds
    assert many.gpu_tokens_per_second > alone.gpu_tokens_per_second


def test_longer_contexts_cost_what_attention_costs():
    short, long = decode_step(unit(144), 64, 1000), decode_step(unit(144), 64, 3000)
    assert long.parts["attention"] == pytest.approx(3 * short.parts["attention"])
    assert long.parts["routed experts"] == short.parts["routed experts"]


def test_absorbed_attention_is_at_the_ridge():
    """A cached token of a layer: 128 heads of 2 (576 + 512) FLOPs over 1152 bytes."""
    step = decode_step(unit(144), 1, 10_000)
    flops = 61 * 10_000 * 128 * 2 * (576 + 512)
    read = 10_000 * 70_272 / unit(144).hardware.bandwidth
    assert step.parts["attention"] == pytest.approx(flops / unit(144).hardware.rate("bf16", 0.56))
    assert step.parts["attention"] == pytest.approx(read, rel=0.25)


@pytest.mark.parametrize(
    ("gpus", "dispatch", "combine"),
    [
        (8, 77, 114),
        (16, 118, 195),
        (32, 155, 273),
        (64, 173, 314),
        (128, 192, 369),
        (256, 194, 360),
    ],
)
def test_exchange_takes_what_deepep_measured(gpus, dispatch, combine):
    """DeepEP's low-latency table: 128 tokens of 7168, top-8, FP8 there and BF16 back."""
    both = exchange_seconds(unit(gpus), EXPERTS, 128)
    assert 1e6 * both == pytest.approx(dispatch + combine, rel=0.15)


def test_deepseeks_production_is_within_the_plan():
    """20 to 22 tokens/s a user, 14.8 K written and 73.7 K read by a node of eight, on a day whose
    load varies; a plan is of full load without gaps, so it is above, and not by far."""
    plan = plan_serving("v3-671b", gpu="h800", gpus=144, prefill_gpus=32)
    assert plan.decode.tokens_per_second == pytest.approx(20, rel=0.02)
    assert 1.0 < 8 * plan.decode.gpu_tokens_per_second / 14.8e3 < 1.7
    assert 1.0 < 8 * plan.prefill.input_per_second / 73.7e3 < 1.7
    assert 0.5 < plan.day.gpus / (8 * 226.75) < 1


@pytest.mark.parametrize(("batch", "measured"), [(32, 4.23), (128, 6.37), (256, 7.26)])
def test_a_plan_bounds_what_an_engine_measured(batch, measured):
    """vLLM 0.25.1, tuned, bench-6b in BF16 on an H200, prompts of 1024: ms a step."""
    plan = plan_serving("bench-6b", gpu="h200", weights="bf16", context=1100, batch=batch)
    assert 0.65 * measured < 1e3 * plan.decode.seconds < measured


def test_cache_hits_save_their_products_and_lengthen_attention():
    cold, warm = prefill(unit(32), 4000), prefill(unit(32), 4000, 0.5)
    assert warm.parts["routed experts"] == pytest.approx(cold.parts["routed experts"])
    assert warm.parts["attention"] == pytest.approx(1.5 * cold.parts["attention"])
    assert warm.input_per_second > 1.5 * cold.input_per_second
    assert cold.input_per_second == cold.computed_per_second


# The network's limit


def test_the_published_limits_come_out():
    slow, fast = NetworkLimit(50), NetworkLimit(900)
    assert 1e6 * slow.exchange_seconds == pytest.approx(120.96)
    assert round(1e3 * slow.step_seconds, 2) == 14.76
    assert int(slow.tokens_per_second) == 67
    assert 1e6 * fast.exchange_seconds == pytest.approx(6.72)
    assert round(1e3 * fast.step_seconds, 2) == 0.82
    assert fast.tokens_per_second == pytest.approx(1200, rel=0.02)


def test_a_plans_own_limit_counts_its_own_network():
    limit = network_limit(unit(144))
    assert limit == NetworkLimit(50, 32, 8, 7168, 58, 3 + 4 / 128)
    assert network_limit(unit(72, "gb200")).gb_per_s == 900
    assert network_limit(unit(8, model="qwen-2.5-72b")) is None
    assert network_limit(unit(1)) is None


# A day


def test_deepseeks_day():
    day = Day()
    assert day.cost == 87_072
    assert day.income == pytest.approx(562_027, rel=2e-4)
    assert f"{day.margin:.0%}" == "545%"
    assert day.traffic.hit_rate * 608e9 == pytest.approx(342e9, rel=2e-3)
    assert (562_027 - day.cost) / day.cost == pytest.approx(5.45, abs=0.005)


def test_income_and_cost_are_linear():
    day = Day(Traffic(2e6, 1e6, 0.5), Prices(1, 2, 4), gpus=10, dollars_per_hour=3)
    assert (day.income, day.cost) == (1 + 2 + 4, 720)
    assert day.margin == (7 - 720) / 720


def test_a_prompt_and_half_an_answer_are_the_mean_context():
    traffic = Traffic(300, 100, 0)
    assert traffic.prompt_of(700) == 600
