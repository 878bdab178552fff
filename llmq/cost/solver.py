"""Work on the weights of one input group: statistics, factorization, target, rounding, refinements, guards, report.

Each function belongs to one file of the code, and has to follow it. The tests compare the products with those that
torch's FLOP counter counts in a real run, so a change of the code without a change here fails a test.

    N rows of all packed layers of the group together, K columns, t tokens
"""

from llmq.cost.work import OPERATIONS_PER_CANDIDATE, OPERATIONS_PER_COLUMN, Kind, Work, total
from llmq.cost.workload import Group, Workload, elementwise, products
from llmq.numerics import affine_grid
from llmq.numerics.scheme import WeightScheme

BLOCK = 128  # columns between two products, of gptq and of descent
STRIP = 1024  # columns of a factor that are inverted at once
GRAM_STRIP = 256  # rows of a second moment that are computed at once
FLOAT = 4  # bytes of a float32
SEARCHED_AT_ONCE = 1 << 18  # weights


def gram(work: Workload, group: Group) -> Work:
    """`InputStats.update`: second moments of the inputs, and with the float stream cross and drift moments."""
    K = group.in_features
    fitted, validation = (group.share * work.length * n for n in (work.fitted, work.validation))
    upper = sum(2.0 * min(GRAM_STRIP, K - start) * (K - start) for start in range(0, K, GRAM_STRIP))
    flops = (fitted + validation) * upper
    if work.compares:
        flops += (fitted + validation) * 2 * K * K + validation * upper
    passes = (4 if work.compares else 2) + 2 * work.method.token_weights
    batches = -(-work.sequences // work.batch)
    return products(work.gram_kind, flops) + elementwise(
        passes * 2 * FLOAT * K * (fitted + validation), batches * (passes + K / GRAM_STRIP)
    )


def factor(work: Workload, group: Group) -> Work:
    """`factorize`: a Cholesky factor in float64, inverted by strips; nothing if no stage needs it."""
    if not work.factors:
        return Work()
    K = group.in_features
    flops = K**3 / 3 + inversion_products(K)
    for start in range(0, K, STRIP):
        flops += min(STRIP, K - start) ** 3
    return products(Kind.FLOAT64, flops) + elementwise(60.0 * K * K, 40)


def inversion_products(K: int) -> float:
    """FLOP of the matrix products of `_invert_upper`."""
    widths = [(start, min(STRIP, K - start)) for start in range(0, K, STRIP)]
    return sum(2.0 * start * width * width + 2.0 * start * start * width for start, width in widths)


def trailing_products(N: int, K: int, block: int = BLOCK) -> float:
    """FLOP of the updates of later columns, after each block of columns."""
    stops = (min(start + block, K) for start in range(0, K, block))
    return sum(2.0 * N * min(block, stop - (stop - 1) // block * block) * (K - stop) for stop in stops)


def output_error(N: int, K: int) -> float:
    """FLOP of `algorithms.output_error`."""
    return 2.0 * N * K * K


def validation_constants(work: Workload, group: Group) -> Work:
    """`ValidationLoss`: w C and w DᵀD wᵀ, which all candidates share."""
    N, K = sum(group.rows), group.in_features
    if not work.judges or not work.compares:
        return Work()
    return products(Kind.FLOAT32, 2 * output_error(N, K)) + elementwise(8.0 * FLOAT * N * K + 30.0 * K * K, 12)


def target(work: Workload, group: Group) -> tuple[Work, Work]:
    """`_targets`: the step of the target, and the choice of its length on validation statistics."""
    N, K = sum(group.rows), group.in_features
    if not work.method.alphas or not work.compares:
        return Work(), Work()
    flops = output_error(N, K) + 2 * times_triangle(N, K)
    step = products(Kind.FLOAT32, flops) + elementwise(14.0 * FLOAT * N * K, 12)
    choice = products(Kind.FLOAT32, output_error(N, K)) + elementwise(8.0 * FLOAT * N * K, 8)
    return step, choice if work.validation else Work()


def times_triangle(N: int, K: int) -> float:
    """FLOP of `times_upper`: a product with a triangle, by strips of columns."""
    return sum(2.0 * N * min(STRIP, K - start) * (K - start) for start in range(0, K, STRIP))


def rounding(work: Workload, group: Group) -> tuple[Work, Work]:
    """The rounding stage: quantized values and scales, and the guard that compares with the nearest values."""
    settings, K = work.settings, group.in_features
    parts, guards = [elementwise(20.0 * FLOAT * group.weights, 30)], []
    searched = settings.scales == "searched"
    plain = settings.order == "natural" and settings.scales == "minmax"
    for N, grid in zip(group.rows, group.grids, strict=True):
        if searched or grid.two_level:
            parts.append(search(N * K, grid))
        if work.method.rounding == "gptq":
            width = grid.columns_per_group(K) if plain and grid.group_size != "tensor" else BLOCK
            parts.append(products(Kind.FLOAT32, trailing_products(N, K, width)))
            guards.append(products(Kind.FLOAT32, output_error(N, K)))  # of the nearest values
            guards.append(elementwise(30.0 * FLOAT * N * K, 25))
    if work.method.rounding == "gptq":
        for grid in dict.fromkeys(group.grids):
            N = sum(rows for rows, other in zip(group.rows, group.grids, strict=True) if other == grid)
            parts.append(columns(N, K))
    return total(parts), total(guards)


def search(weights: int, grid: WeightScheme) -> Work:
    """`grid_search`: the error of each candidate scale (and zero point) of each group."""
    shifts = 1 if grid.symmetric else 2 * affine_grid.ZERO_STEPS + 1
    candidates = 1 + affine_grid.COARSE_STEPS + affine_grid.FINE_STEPS * shifts
    calls = candidates * OPERATIONS_PER_CANDIDATE * -(-weights // SEARCHED_AT_ONCE)
    return Work({Kind.SEARCHED: float(weights * candidates), Kind.CALLS: float(calls)})


def columns(N: int, K: int) -> Work:
    """`gptq_block`: the loop over columns."""
    return Work({Kind.COLUMNS: float(N * K), Kind.CALLS: float(OPERATIONS_PER_COLUMN * K)})


def refinements(work: Workload, group: Group) -> tuple[Work, Work]:
    """All refinements, and their guards: the validation loss of the rounded weights and of each result."""
    K, parts = group.in_features, [Work()]
    for name in work.method.refinements:
        for N, grid in zip(group.rows, group.grids, strict=True):
            parts.append(descent(N, K) if name == "descent" else refit(N, K, grid))
        if name == "descent":
            for grid in dict.fromkeys(group.grids):
                parts.append(columns(sum(n for n, g in zip(group.rows, group.grids, strict=True) if g == grid), K))
    if not work.method.refinements or not work.validation:
        return total(parts), Work()
    judged = products(Kind.FLOAT32, output_error(sum(group.rows), K)) + elementwise(15.0 * FLOAT * group.weights, 20)
    return total(parts), judged * (1 + len(work.method.refinements))


def descent(N: int, K: int) -> Work:
    """`descent.refine`: the first gradient, and per block a start and the update of the gradient of later columns."""
    starts = sum(2.0 * min(BLOCK, K - start) ** 2 * N for start in range(0, K, BLOCK))
    flops = output_error(N, K) + starts + trailing_products(N, K)
    return products(Kind.FLOAT32, flops) + elementwise(30.0 * FLOAT * N * K, 12 * K / BLOCK)


def refit(N: int, K: int, grid: WeightScheme) -> Work:
    """`refit.refine`: normal equations, a system per row, and by how much its solution changes the loss."""
    G = -(-K // grid.columns_per_group(K))
    flops = (4 if grid.two_level else 2) * output_error(N, K) + 2.0 * N * G * G
    solved = 2.0 / 3.0 * N * G**3
    return products(Kind.FLOAT32, flops + solved) + elementwise(3.0 * FLOAT * N * K * G + 20.0 * FLOAT * N * K, 6 * G)


def report(work: Workload, group: Group) -> Work:
    """`layer_report`, and packing: the signal, the error unless rounding has computed it, and the error of `rtn`."""
    N, K = sum(group.rows), group.in_features
    moved = elementwise(24.0 * FLOAT * group.weights, 60.0 * len(group.rows))
    if not work.method.needs_calibration:
        return moved
    targets = bool(work.method.alphas) and work.compares
    known = work.method.rounding == "gptq" and not work.method.refinements and not targets
    errors = (1 if known else 2) * output_error(N, K)
    parts = [moved]
    if group.share == 1:  # not for experts
        errors += output_error(N, K)
        if work.settings.scales == "searched":
            parts += [search(rows * K, grid) for rows, grid in zip(group.rows, group.grids, strict=True)]
    return total([*parts, products(Kind.FLOAT32, errors)])


def by_stage(work: Workload, group: Group) -> dict[str, Work]:
    """All work on a group whose layers are quantized."""
    rounded, guards = rounding(work, group)
    refined, judged = refinements(work, group)
    step, choice = target(work, group)
    stages = {
        "rounding": total([rounded, refined, step]),
        "guards": total([guards, judged, choice, validation_constants(work, group)]),
        "report": report(work, group),
    }
    if work.method.needs_calibration:
        stages |= {"statistics": gram(work, group), "factorization": factor(work, group)}
    return stages
