"""The sections of the page: claim, theorem, picture, number, verdict.

Texts are plain: x_{i} is an index and §2.6 a section of docs/method.md, which page.py turns into HTML. "found" is
evidence.json. What holds by construction is a theorem with its reason; a verdict is of what could come out otherwise.
"""

from typing import Any, NamedTuple

from fewshot.config.tree import MODES
from fewshot.evidence import claims
from fewshot.evidence.claims import Verdict, decimals, interval, percent, short


class Picture(NamedTuple):
    name: str
    alt: str
    caption: str
    small: bool = False


class Table(NamedTuple):
    heads: tuple[str, ...]  # empty: none
    rows: list[tuple[str, ...]]
    kind: str = "numbers"


class Statement(NamedTuple):
    text: str
    verdicts: list[tuple[str, Verdict]]  # of what, and which
    notes: tuple[str, ...] = ()
    anchor: str = ""  # of what it links to


class Statements(NamedTuple):
    """A table of them."""

    heads: tuple[str, str]
    rows: list[Statement]
    heading: str = ""
    kind: str = "statements"


class Section(NamedTuple):
    anchor: str
    overline: str
    claim: str
    lead: str
    tables: list[Table | Statements]
    verdicts: list[tuple[str, Verdict]]  # of what, and which
    theorem: str = ""
    picture: Picture | None = None
    note: str = ""


def sections(found: dict[str, Any]) -> list[Section]:
    parts = (_motivating_example, _outer_step, _noise, _similarity, _memory, _prototypes, _accuracy)
    return [*(part(found) for part in parts), _identities(found), _limits(found)]


def head_is_zero(found: dict[str, Any]) -> bool:
    """Or the same for every class, which has no effect either."""
    return all(found["same_for_all"].values())


def is_trained(found: dict[str, Any]) -> bool:
    return found["model"]["iteration"] > 0


def _motivating_example(found: dict[str, Any]) -> Section:
    example = found["motivating_example"]
    rows = [
        ("Mean logit of a query’s own class, which the loss wants to be 1", decimals(example["same_class"])),
        ("Mean logit of the other classes, which it wants to be 0", decimals(example["other_class"])),
        ("The program’s largest relative difference from the theorem, columns", short(example["classifier_error"])),
        ("The same, logits", short(example["logits_error"])),
    ]
    return Section(
        anchor="motivating-example",
        overline="Motivating example",
        claim="One inner step writes the support features into the classifier",
        lead="The simplest case (§2.1): mean squared error, a classifier w that starts at zero and has no bias, one "
        "inner step. A query’s logits are then inner products of features, and the outer loss, which wants them to be "
        "1 within a class and 0 across, is a contrastive loss.",
        theorem="Column i of w becomes η m_{i}, where m_{i} is the sum of class i’s support features, and the logits "
        "become η φ(q)·m_{i}: at w = 0 the gradient of the loss is −m_{i}, for the predictions in it are 0.",
        picture=Picture(
            "motivating_example",
            "Three heat maps: cosines of classifier columns and support features, logits, inner products",
            "One test task. A column of each map is a class, shown by its first support image; a row of the two maps "
            "on the right is a query. Left: column i of the classifier has cosine 1 with class i. Middle and right are "
            "the same numbers, one from an inner step, the other from the features alone.",
        ),
        tables=[Table((), rows)],
        verdicts=[
            ("With these features the logit of a query’s own class is the larger.", claims.motivating_example(example))
        ],
    )


def _outer_step(found: dict[str, Any]) -> Section:
    step, steps = found["outer_step"], found["config"]["inner_steps"]
    rows = [
        (
            f"{order.upper()}, {name}",
            *(short(step[head][order][key]) for key in ("query_norm", "support_norm")),
            *(percent(step[head][order][key]) for key in ("same_class_drawn", "other_class_pushed")),
        )
        for head, name in (("this_head", "this head"), ("zeroed_head", "head zeroed"))
        for order in ("fomaml", "somaml")
    ]
    terms = found["probes"]
    right_way = "’s outer step moves pairs of a query and a support image the right way."
    return Section(
        anchor="outer-step",
        overline="The contrastive perspective",
        claim="FOMAML moves the queries, SOMAML moves queries and support",
        lead="Seen from the features, the outer step moves a query toward the support features of its class and away "
        "from the others (§2.4), and under SOMAML the support features too (§2.5). As everywhere in the theory, the "
        "inner loop is that of the head alone.",
        theorem="FOMAML moves queries only: it takes what the inner loop made of the support features for constants, "
        "so their gradient is 0. SOMAML’s gradient goes back through the inner loop, which is made of them.",
        picture=Picture(
            "outer_step",
            "Features of a task in two dimensions with arrows, FOMAML left and SOMAML right",
            "The features of one test task along their two principal directions, which hold "
            f"{percent(step['spread_shown'])} of their variance. Colour and shape are the class. Arrows go against the "
            f"gradient with respect to the features after {counted_steps(steps)}; queries and support have a scale "
            "each in every row, the same left and right. The encoder, which serves all images at once, can follow them "
            "only roughly.",
        ),
        tables=[
            Table(("", "step of the queries", "step of the support", "same class drawn", "other classes pushed"), rows)
        ],
        note=f"Steps are norms of the gradient, means over {found['tasks']['features']} tasks. The last two columns "
        "count the pairs of a query and a support image whose inner product a small step moves the right way, up "
        "within a class and down across; steps add up, so not every pair has its way. With this model’s head the "
        f"queries’ step is the sum of an interference term of norm {short(terms['interference_norm'])} and a "
        f"contrastive term of norm {short(terms['contrastive_norm'])}; with a zeroed head it is the latter alone.",
        verdicts=list(zip((f"FOMAML{right_way}", f"SOMAML{right_way}"), claims.outer_step(step), strict=True)),
    )


def _noise(found: dict[str, Any]) -> Section:
    c = found["coefficients"]
    cases = {"this_head": "this head, one step", "more_steps": f"head zeroed, {c['inner_steps']} steps"}
    this, later = claims.noise(c, head_is_zero(found))
    return Section(
        anchor="noise",
        overline="Noise",
        claim="Zeroing the head takes the noise out of the contrastive coefficients, for one inner step",
        lead="How strongly query q is drawn to support image s is the coefficient c_{qs} (§2.3). A head that is not "
        "zero adds noise to it, and images of different classes can be drawn together.",
        theorem="Within a class no sign is ever wrong: c_{qs} = (1 − q_{u})(1 − s_{u}) + Σ_{j≠u} q_{j} s_{j} ≥ 0. From "
        "a zeroed head and in one step no sign at all is wrong: the support predictions are 1/K, so c_{qs} = 1[t=u] − "
        "q_{t}, and 0 < q_{t} < 1 (§2.6).",
        picture=Picture(
            "coefficients",
            "Heat maps of the contrastive coefficients of queries and support images",
            "One test task: a row for each query, a column for each support image. Orange draws together, blue pushes "
            "apart. A dot marks a sign that is wrong for the pair.",
        ),
        tables=[
            Table(
                ("wrong signs", "of all pairs", "of pairs of different classes"),
                [
                    (name, percent(c[case]["wrong_sign"]), percent(c[case]["wrong_among_other"]))
                    for case, name in cases.items()
                ],
            )
        ],
        verdicts=[
            ("This model’s head draws different classes together.", this),
            ("From a zeroed head, later steps turn no sign.", later),
        ],
    )


def _similarity(found: dict[str, Any]) -> Section:
    cosines, verdict = found["probes"], claims.similarity(found["similarity"], is_trained(found))
    rows = [
        (name, decimals(cosines[f"cosine_same{suffix}"]), decimals(cosines[f"cosine_other{suffix}"]))
        for name, suffix in (("a query and a support image", ""), ("two queries", "_queries"))
    ]
    return Section(
        anchor="similarity",
        overline="Question 1",
        claim="MAML learns features that are alike within a class",
        lead="If the outer loop is a contrastive learner, then images of one class must have similar features and "
        "images of different classes must not, before anything is adapted.",
        picture=Picture(
            "similarity",
            "Heat maps of mean cosine similarity between classes",
            "One test task, features of the unadapted encoder: mean cosine similarity of the images of every two "
            "classes, an image with itself left out.",
        ),
        tables=[Table(("mean cosine similarity", "within a class", "across classes"), rows)],
        verdicts=[("Training made them alike within a class, unlike across.", verdict)],
    )


def _memory(found: dict[str, Any]) -> Section:
    memory = found["memory"]
    cases = {
        "this_head_before": "this head, before the step",
        "this_head_after": "this head, after one step",
        "zeroed_head_after": "head zeroed, after one step",
    }
    rows = [
        (name, decimals(each["same_class"]), decimals(each["other_class"]), percent(each["nearest_is_own"]))
        for case, name in cases.items()
        if (each := memory[case])
    ]
    return Section(
        anchor="memory",
        overline="Question 2",
        claim="In the inner loop the classifier memorises support features",
        lead="One inner step on cross entropy adds the support features of class i to column i of the classifier and "
        "takes those of the others away (§2.2). So afterwards column i should look like the mean support feature of "
        "its class. What all columns have in common changes no prediction, so their mean is taken off first.",
        theorem="From a zeroed head column i becomes (η/K)(μ_{i} − mean μ), as the support predictions are 1/K (§2.6).",
        picture=Picture(
            "memory",
            "Heat maps of cosines between classifier columns and support means",
            "One test task: cosine similarity of column i of the classifier, less the mean of all columns, and each "
            "class’s mean support feature.",
            small=head_is_zero(found),
        ),
        tables=[Table(("mean cosine similarity", "own class", "other classes", "nearest is own class"), rows)],
        verdicts=[("Columns memorise the support of their class.", claims.memory(memory))],
    )


def _prototypes(found: dict[str, Any]) -> Section:
    agreement = found["prototypes"]
    later, this = claims.prototypes(agreement, head_is_zero(found))
    each = enumerate(zip(agreement["this_head"], agreement["zeroed_head"], strict=True), 1)
    ties = (
        f"{agreement['ties']} of the {agreement['queries']} queries have a tie, any class of which counts as agreement."
    )
    return Section(
        anchor="prototypes",
        overline="Question 3",
        claim="Support features act as prototypes",
        lead="A classifier made of support features compares a query with them: it chooses the class whose mean "
        "support feature has the largest inner product with the query’s, argmax_{k} φ(q)·μ_{k}.",
        theorem="From a zeroed head one inner step is exactly this classifier, whatever the inner learning rate: the "
        "logits are (η/K)(φ(q)·μ_{k} − what is the same for all k), and the encoder has not moved (§2.6).",
        picture=Picture(
            "prototypes",
            "Agreement with the prototype classifier over inner steps",
            "Share of the queries to which the adapted model and the prototype classifier give the same class.",
        ),
        tables=[
            Table(
                ("inner step", "from this head", "from a zeroed head"),
                [(str(step), *(percent(share) for share in shares)) for step, shares in each],
            )
        ],
        note=f"Of {agreement['queries']} queries the prototype classifier, which adapts nothing, gets "
        f"{percent(agreement['accuracy'])} right. {ties if agreement['ties'] else 'No query has a tie.'}",
        verdicts=[("With the head zeroed, beyond the first step.", later), ("With this head.", this)],
    )


def _accuracy(found: dict[str, Any]) -> Section:
    test, step = found["test"], found["config"]["inner_steps"]
    modes = [zip(test[mode]["accuracy"], test[mode]["ci95"], strict=True) for mode in MODES]
    rows = [(str(number), *(interval(*each) for each in both)) for number, both in enumerate(zip(*modes, strict=True))]
    verdict = claims.accuracy(test, step, head_is_zero(found), is_trained(found))
    return Section(
        anchor="accuracy",
        overline="Accuracy",
        claim="The head need not be remembered between tasks",
        lead="What a head keeps from one task to the next are features of unrelated tasks (§2.7). If that is mere "
        "noise, a head that is zeroed before it adapts to a test task does as well.",
        picture=Picture(
            "accuracy",
            "Test accuracy over inner steps, with and without zeroing the head",
            f"Query accuracy after every inner step: mean over {test['tasks']} test tasks and 95% confidence interval.",
        ),
        tables=[Table(("inner step", "test zeroing off", "test zeroing on"), rows)],
        verdicts=[("Zeroing the head at test time costs nothing.", verdict)],
    )


def _identities(found: dict[str, Any]) -> Section:
    checks, steps = found["identities"], found["config"]["inner_steps"]

    def table(statements: dict[str, tuple[str, str]], heading: str) -> Statements:
        rows = [
            Statement(statement, [("", claims.of_check(checks[name]))], (what,))
            for name, (statement, what) in statements.items()
            if name in checks
        ]
        return Statements(("statement, and what its number is", "verdict"), rows, heading)

    return Section(
        anchor="identities",
        overline="Identities",
        claim="With a zeroed head and one inner step, MAML is supervised contrastive learning",
        lead="The theory is no tendency: for one inner step from a zeroed head it is a set of equations (§2.6), true "
        "of any model. What is checked is that this program, on this model, does what they are about: their two sides "
        "are computed apart, by the program’s own inner loop and automatic differentiation wherever the other is a "
        f"closed form, in float64, on {found['tasks']['gradients']} test tasks of K = {found['config']['ways']} "
        "classes. Counts must agree to the last unit. Sums may differ by their rounding: 1e−12 is some thousand times "
        "what float64 rounds near one, and 1e−10 leaves room for the same after convolutions and BatchNorm.",
        theorem="The interference term E_{Q} W_{0} of the queries’ gradient vanishes, for W_{0} = 0 (§2.4). Rows of "
        "E_{Q} sum to 0, so it vanishes too where all classes have the same weights.",
        tables=[
            table(claims.IDENTITIES, "With the head zeroed, one inner step"),
            table(claims.SPLITS, f"With this model’s own head, {counted_steps(steps)} of the head"),
        ],
        note="" if "bias_after_one_step" in checks else "This model’s head has no bias.",
        verdicts=[("", claims.of_all(checks))],
    )


def _limits(found: dict[str, Any]) -> Section:
    checks, same_for_all = found["limits"], found["same_for_all"]
    rows = [
        Statement(
            f"Expected: {expected}",
            [("", claims.of_limit(name, checks[name], same_for_all))],
            (why, f"Measured: {what}."),
        )
        for name, (expected, why, what) in claims.LIMITS.items()
        if name in checks
    ]
    return Section(
        anchor="limits",
        overline="Where it ends",
        claim="What does not hold",
        lead="Statements that are in the paper, or easily read into it, and that its formulas do not bear out (§2.5, "
        "§2.6), measured like the identities and on the same tasks; where it takes more than one inner step, with "
        f"{found['coefficients']['inner_steps']}.",
        tables=[Statements(("expected and found", "verdict"), rows)],
        verdicts=[("", claims.of_limits(checks, same_for_all))],
    )


def counted_steps(number: Any) -> str:
    return f"{number} inner step{'s' * (number != 1)}"
