"""``whalefall plan``: the arithmetic behind the design."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperGroup

from whalefall.cli.show import Html, Json, show
from whalefall.errors import UserError

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A preset, a model the planner knows, or a config.json."),
]
Gpu = Annotated[str, typer.Option(help="A known machine or a YAML file.")]


class PlanGroup(TyperGroup):
    """``plan MODEL`` is ``plan train MODEL``: a first word that is no command is a model."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["train", *args]
        return super().parse_args(ctx, args)


plan_app = typer.Typer(cls=PlanGroup, no_args_is_help=True)


@plan_app.callback()
def plan() -> None:
    """Does it fit, how long does it take, what does it cost: arithmetic, no GPU.

    plan MODEL is plan train MODEL.
    """


@plan_app.command("train")
def plan_train(
    model: Model,
    gpus: Annotated[int, typer.Option(min=1, help="How many.")],
    gpu: Gpu,
    network: Annotated[
        str | None,
        typer.Option(help="Between the nodes: ft2, mpft, ft3, slim-fly or dragonfly."),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="What is fixed of it, such as pp16,ep64,dualpipe,selective.")
    ] = "",
    sequence: Annotated[int | None, typer.Option(min=1, help="Tokens of a row.")] = None,
    batch_rows: Annotated[int | None, typer.Option(min=1, help="Rows of a step.")] = None,
    tokens: Annotated[float | None, typer.Option(help="To train on.")] = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Plan a training run: memory, time by part, cost, and the layouts that do best."""
    from whalefall.plan.answers import training_report
    from whalefall.plan.search import plan_training

    answer = plan_training(
        model,
        gpus=gpus,
        gpu=gpu,
        network=network,
        layout=layout,
        sequence=sequence,
        batch_rows=batch_rows,
        tokens=tokens,
    )
    show(training_report(answer), as_json, html)


@plan_app.command("serve")
def plan_serve(
    model: Model,
    gpu: Gpu,
    gpus: Annotated[
        int | None, typer.Option(help="That decode together; the fewest that fit unless told.")
    ] = None,
    prefill_gpus: Annotated[
        int | None, typer.Option(help="That read prompts together; as many unless told.")
    ] = None,
    tp: Annotated[
        int | None, typer.Option(help="That share a sequence; the fewest that fit unless told.")
    ] = None,
    redundant: Annotated[
        int | None, typer.Option(help="Experts held twice; what fills the GPUs unless told.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Sequences of a group; as many as fit and are fast enough unless told."),
    ] = None,
    slowest_ms: Annotated[float, typer.Option(help="Milliseconds a token that users accept.")] = 50,
    context: Annotated[int, typer.Option(help="Mean tokens of a sequence while decoding.")] = 4989,
    weights: Annotated[
        Literal["fp8", "bf16", "fp32"] | None, typer.Option(help="FP8 where there is, unless told.")
    ] = None,
    cache: Annotated[
        Literal["fp8", "bf16", "fp32"] | None, typer.Option(help="The working type unless told.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens that attention looks back.")] = None,
    hit_rate: Annotated[float, typer.Option(help="Share of input that the cache has.")] = 0.563,
    input_tokens: Annotated[float, typer.Option(help="Of a day, hits included.")] = 608e9,
    output_tokens: Annotated[float, typer.Option(help="Of a day.")] = 168e9,
    price_hit: Annotated[float, typer.Option(help="$ for a million tokens in the cache.")] = 0.14,
    price_miss: Annotated[float, typer.Option(help="$ for a million not in it.")] = 0.55,
    price_output: Annotated[float, typer.Option(help="$ for a million written.")] = 2.19,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Plan serving: what fits, how fast it is, what the network allows, income and cost."""
    from whalefall.plan.answers import serving_report
    from whalefall.plan.serving import Prices, Traffic, plan_serving

    plan = plan_serving(
        model,
        gpu=gpu,
        gpus=gpus,
        prefill_gpus=prefill_gpus,
        tp=tp,
        redundant=redundant,
        batch=batch,
        slowest=slowest_ms / 1e3,
        context=context,
        weights=weights,
        cache=cache,
        window=window,
        traffic=Traffic(input_tokens, output_tokens, hit_rate),
        prices=Prices(price_hit, price_miss, price_output),
    )
    show(serving_report(plan), as_json, html)


@plan_app.command("network")
def plan_network(
    endpoints: Annotated[
        int | None, typer.Option(help="To connect; the published networks unless told.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="The machine whose cards are connected.")] = "h800",
    latency: Annotated[
        Literal["infiniband", "roce"], typer.Option(help="What the switches are.")
    ] = "infiniband",
    mib: Annotated[float, typer.Option(help="That each endpoint sends to all others.")] = 64,
    switch_price: Annotated[float, typer.Option(help="$ of a switch with 64 ports.")] = 50_000,
    link_price: Annotated[float, typer.Option(help="$ of a link between switches.")] = 1_540,
    short_link_price: Annotated[float, typer.Option(help="$ within a Dragonfly group.")] = 1_458,
    endpoint_price: Annotated[float, typer.Option(help="$ of an endpoint's cable.")] = 510,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Compare networks: FT2, MPFT, FT3, Slim Fly and Dragonfly, by size, cost and speed."""
    from whalefall.plan.answers import network_report
    from whalefall.plan.hardware import load_hardware
    from whalefall.plan.network_cost import LATENCIES, UnitPrices, compare_networks

    found = compare_networks(
        endpoints,
        card=load_hardware(gpu).nic,
        size=mib * 2**20,
        latencies=LATENCIES[latency],
        prices=UnitPrices(switch_price, link_price, short_link_price, endpoint_price),
    )
    show(network_report(found), as_json, html)


@plan_app.command("cost")
def plan_cost(
    gpu_hours: Annotated[
        float | None, typer.Option(help="Of the final run; DeepSeek-V3's unless told.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="That it runs on.")] = 2048,
    gpu: Gpu = "h800",
    rent: Annotated[
        float | None, typer.Option(help="$ for a GPU hour; the machine's unless told.")
    ] = None,
    attempts: Annotated[
        float | None, typer.Option(help="All compute over the final run's; 1.2 to 4 unless told.")
    ] = None,
    people: Annotated[float | None, typer.Option(help="100 to 200 unless told.")] = None,
    years: Annotated[float | None, typer.Option(help="Of work; 0.4 to 1 unless told.")] = None,
    salary: Annotated[
        float | None, typer.Option(help="$ a person and year with overheads; 260 to 990 K.")
    ] = None,
    gpu_price: Annotated[
        float | None, typer.Option(help="$ of a GPU with its share of the server; 34 to 50 K.")
    ] = None,
    lifetime: Annotated[float | None, typer.Option(help="Years; 3 to 5 unless told.")] = None,
    use: Annotated[
        float | None, typer.Option(help="Share of hours in use; 0.6 to 0.9 unless told.")
    ] = None,
    pue: Annotated[
        float | None, typer.Option(help="Power at the meter over the machines'; 1.1 to 1.56.")
    ] = None,
    kwh_price: Annotated[
        float | None, typer.Option(help="$ a kWh; 0.06 to 0.12 unless told.")
    ] = None,
    building: Annotated[
        float | None, typer.Option(help="$ a kW and month of building; 100 to 200 unless told.")
    ] = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """What a whole programme costs: runs that fail, people, GPUs rented or bought."""
    from whalefall.plan.answers import cost_report
    from whalefall.plan.cost import plan_programme

    plan = plan_programme(
        gpu_hours,
        gpus,
        gpu,
        rent,
        attempts=attempts,
        people=people,
        years=years,
        dollars_per_person_year=salary,
        server_dollars=gpu_price,
        lifetime_years=lifetime,
        use=use,
        power_usage_effectiveness=pue,
        dollars_per_kwh=kwh_price,
        dollars_per_kw_month=building,
    )
    show(cost_report(plan), as_json, html)


@plan_app.command("schedule")
def plan_schedules(
    pp: Annotated[int, typer.Option(help="Stages of the network.")],
    micro_batches: Annotated[int, typer.Option(help="Of a step.")],
    kind: Annotated[
        str | None, typer.Option(help="1f1b, zb1p, zb-v, dualpipe or dualpipev; all unless told.")
    ] = None,
    forward: Annotated[float, typer.Option(help="F, time of a forward pass of a stage.")] = 1.0,
    backward: Annotated[float, typer.Option(help="B, of a whole backward pass.")] = 2.0,
    weight: Annotated[float, typer.Option(help="W, the part of B that may wait.")] = 1.0,
    overlapped: Annotated[
        float | None, typer.Option(help="F&B, of both at once; F + B unless told.")
    ] = None,
    transfer: Annotated[float, typer.Option(help="From a rank to the next.")] = 0.0,
    drawing: Annotated[
        Path | None, typer.Option("--draw", help="Write a picture (SVG); needs --kind.")
    ] = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Compare pipeline schedules: bubble, activations, parameters; draw one."""
    from whalefall.plan.answers import plan_schedules, schedule_report
    from whalefall.plan.report import write
    from whalefall.plan.schedule_drawing import draw
    from whalefall.plan.schedules import Times

    if drawing is not None and kind is None:
        raise UserError("--draw needs --kind: a picture shows one schedule")
    times = Times(
        forward=forward,
        backward=backward,
        weight_gradient=weight,
        overlapped=forward + backward if overlapped is None else overlapped,
        transfer=transfer,
    )
    found, refused = plan_schedules(pp, micro_batches, kind, times)
    if drawing is not None:
        write(drawing, draw(found[0]))
    show(schedule_report(found, refused, pictures=html is not None), as_json, html)
