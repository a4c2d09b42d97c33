"""`vllm-sparsek fit`: capture dense attention, fit every layer, split the budget, write a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from vllm_sparsek.attention.layer_budgets import split_budget
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.model_id import model_fingerprint
from vllm_sparsek.scorers.features import Rope, concatenate
from vllm_sparsek.scorers.learned import load_layer
from vllm_sparsek.scorers.scorer_file import ScorerFile, ScorerHeader, save_scorer
from vllm_sparsek.serving_bench.progress import Progress
from vllm_sparsek.training.budgets import (
    MOST_SHARE,
    PARTS,
    Score,
    allocate,
    allocate_measured,
    curve,
    measure_damage,
    measure_splits,
)
from vllm_sparsek.training.capture import (
    Capture,
    CaptureSettings,
    attention_layers,
    load_model,
)
from vllm_sparsek.training.data import (
    Window,
    digest,
    probe_windows,
    read_texts,
    refinement_window,
    standard_library,
    training_windows,
)
from vllm_sparsek.training.objective import Targets, dropped, kept_share
from vllm_sparsek.training.refine import LogitsRefinement, Sampled, refine_outputs
from vllm_sparsek.training.solve import LayerScorer, SolveSettings, fit_layer
from vllm_sparsek.training.store import Store

# recall is reported, and budgets are split, at this share of the context
SHARE = 0.25
REFRESH = 64
# splits of the budget are judged at these shares
JUDGED = (SHARE, 0.12)
# number of the windows that measure damage and of those that judge splits, and the lengths of each
PROBES = {"cpu": (1, 4096, 2560), "cuda": (6, 4096, 8192)}
# of the finished steps' tensors: an earlier version's are not gone on with
STEPS_VERSION = 5
# every so-many-th query is kept for output reconstruction
QUERY_STRIDE = 16
# length of the windows that the whole model is refined on, and steps between two checkpoints
REFINE_TOKENS = {"cpu": 1024, "cuda": 4096}
REFINE_KEPT = 5


@dataclass(frozen=True)
class FitSettings:
    """What is fitted to what.

    Attributes:
        model: folder or hub id.
        data: texts; empty: Python's standard library.
        window_tokens, windows: length and number of the training windows, two of them held out.
        features: see ``scorers.scorer_file``; ``key_unrotated`` is left out of models whose
            rotary embedding is not one table for all layers.
        layer_budgets: also split the budget over the layers and their KV heads.
        measure_heads: try splits by the measured damage of every head alone, too.
        device: where the model runs.
        solve: how a layer is fitted.
        refine: what scorers are trained on by after that: ``outputs`` (each layer's output),
            ``logits`` (the model's next tokens, all layers at once), or None.
        refine_steps: of it; with ``outputs``, for every layer.
    """

    model: str
    data: tuple[str, ...] = ()
    window_tokens: int = 8192
    windows: int = 10
    features: tuple[str, ...] = ("key_unrotated", "key", "value")
    layer_budgets: bool = True
    device: str = "cpu"
    solve: SolveSettings = field(default_factory=SolveSettings)
    refine: str | None = None
    refine_steps: int = 0
    measure_heads: bool = False


@dataclass(frozen=True)
class LayerReport:
    """How a layer's fit went; all but ``losses`` on the windows held out.

    Attributes:
        layer: index; losses: of every round of budgets, on the training windows.
        loss: attention dropped; recall: share of attention to far tokens kept at 25 %;
        answer_recall: the same of attention that answers pay.
        refinement: loss of every step of output reconstruction, on the training windows.
    """

    layer: int
    losses: list[float]
    loss: float
    recall: float
    answer_recall: float
    refinement: list[float]


@dataclass(frozen=True)
class SplitReport:
    """One way to split the budget.

    Attributes:
        name: of the way; kept: whether it was the best.
        divergence: of the model's next tokens from dense with everything sparse, at the shares
            ``JUDGED`` of windows held out.
        shares: [layers, H] relative budgets.
    """

    name: str
    kept: bool
    divergence: list[float]
    shares: list[list[float]]

    def __str__(self) -> str:
        numbers = ", ".join(
            f"{found:.4g} at {share:.0%}"
            for found, share in zip(self.divergence, JUDGED, strict=True)
        )
        return f"{self.name}: {numbers}"


@dataclass(frozen=True)
class FitReport:
    """How a fit went.

    Attributes:
        layers: one report a layer.
        refinement: loss of every step; by ``outputs``, on average over the layers.
        splits: of the budget that were tried.
    """

    layers: list[LayerReport]
    refinement: list[float]
    splits: list[SplitReport] = field(default_factory=list)


def fit(settings: FitSettings, out: Path, progress: Progress) -> FitReport:
    """Fit a scorer and write it to ``out``; an interrupted fit goes on where it stopped.

    Args:
        settings: what is fitted.
        out: the scorer file; finished steps are kept beside it until it is written.
        progress: shows the steps.

    Returns:
        how it went.

    Raises:
        DataError: texts that cannot be used. ScorerFileError: ``out`` cannot be written.
    """
    texts = read_texts([Path(p) for p in settings.data]) or [standard_library()]
    source, fingerprint = digest(texts), model_fingerprint(settings.model)
    record = {
        **asdict(settings), "data": source, "model": fingerprint, "steps_version": STEPS_VERSION,
    }  # fmt: skip
    store = Store(out.with_name(f".{out.name}.work"), record)
    if store.resumed:
        progress.say("going on where an earlier fit with the same settings stopped")
    run = _Run(settings, store, progress, source, fingerprint)
    run.load(texts)
    run.capture()
    run.fit_layers()
    if settings.refine == "logits":
        run.refine_logits()
    splits = run.split_budget() if settings.layer_budgets else []
    save_scorer(out, run.scorer_file(splits))
    report = run.report(splits)
    store.remove()
    return report


def rope_of(model: Any) -> Rope | None:
    """The rotary embedding that all layers of a transformers model share, or None."""
    tables = [m.inv_freq for m in model.modules() if isinstance(getattr(m, "inv_freq", None),
                                                                torch.Tensor)]  # fmt: skip
    if not tables or any(t.shape != tables[0].shape or (t != tables[0]).any() for t in tables):
        return None
    return Rope(tables[0].float().cpu(), interleaved=False)


class _Run:
    """One fit: the steps in their order, each skipped if the store has it."""

    def __init__(
        self,
        settings: FitSettings,
        store: Store,
        progress: Progress,
        source: str,
        fingerprint: str | None,
    ) -> None:
        self.settings, self.store, self.progress = settings, store, progress
        self.source, self.fingerprint = source, fingerprint
        self.device = torch.device(settings.device)
        # of settings that depend on how fast it is
        self.kind = "cuda" if self.device.type == "cuda" else "cpu"
        # proportions of a window: eight segments, and tokens nearer than a sixteenth of it are
        # taken to be in the sliding window anyway
        tokens = settings.window_tokens
        gap = min(settings.solve.split.window, tokens // 16)
        self.capturing = CaptureSettings(
            segment=tokens // 8, gap=gap, hidden="hidden" in settings.features,
            queries=QUERY_STRIDE if settings.refine == "outputs" else 0,
        )  # fmt: skip
        self.solve = replace(settings.solve, split=replace(settings.solve.split, window=gap))

    def load(self, texts: list[Any]) -> None:
        """The model and its training windows."""
        from transformers import AutoTokenizer

        settings = self.settings
        self.texts = texts
        with self.progress.task("load the model"):
            self.model = load_model(settings.model, self.device, torch.bfloat16)
            self.tokenizer = AutoTokenizer.from_pretrained(settings.model)
            self.windows = training_windows(
                self.tokenizer, texts, settings.window_tokens, settings.windows,
                settings.solve.seed,
            )  # fmt: skip
            # more, for the damage of layers and to judge splits: not among those fitted to
            count, *lengths = PROBES[self.kind]
            lengths = [min(tokens, settings.window_tokens) for tokens in lengths]
            self.probe_tokens, self.judge_tokens = lengths
            self.probes, self.judges = (
                probe_windows(self.tokenizer, texts, tokens, count, settings.solve.seed + more)
                for more, tokens in enumerate(lengths, 1)
            )
        self.rope = rope_of(self.model) if "key_unrotated" in settings.features else None
        self.features = tuple(
            name for name in settings.features if name != "key_unrotated" or self.rope is not None
        )
        held = _held_out(self.windows)
        self.held_out = held
        self.training = [i for i in range(len(self.windows)) if i not in held]

    def capture(self) -> None:
        """What dense attention looks at, window by window."""
        capture = Capture(self.model, self.capturing)
        for index, window in enumerate(self.windows):
            if self.store.has(f"window-{index}"):
                continue
            with self.progress.task(
                f"read window {index + 1} of {len(self.windows)}: {window.name}"
            ):
                found = capture.run(window.ids, window.answers)
                tensors = {
                    f"{layer}.{name}": tensor
                    for layer, view in found.items()
                    for name, tensor in vars(view).items()
                    if tensor is not None
                }
                self.store.write(f"window-{index}", tensors, sorted(found))
        self.layers: list[int] = self.store.record("window-0")
        self.progress.more(len(self.layers))

    def _layer(self, layer: int, windows: list[int]) -> tuple[torch.Tensor, Targets]:
        """Features [H, W, n, F] and targets of one layer."""
        x, mass, answers = [], [], []
        for index in windows:
            view = self.store.read(f"window-{index}", f"{layer}.")
            x.append(self._features(view["key"], view["value"], view.get("hidden")))
            mass.append(view["mass"])
            answers.append(view["answers"])
        targets = Targets(
            torch.stack(mass).to(self.device), torch.stack(answers).to(self.device),
            self.capturing.segment,
        )  # fmt: skip
        return torch.stack(x, dim=1).to(self.device), targets

    def _features(
        self, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """Features [H, n, F] of key, value [H, n, D] and hidden [n, E]."""
        rope = self.rope
        if rope is not None:
            rope = Rope(rope.inv_freq.to(key.device), rope.interleaved)
        position = torch.arange(key.shape[1], device=key.device)
        x = concatenate(
            self.features, key.transpose(0, 1), value.transpose(0, 1), position, hidden, rope
        )
        return x.expand(-1, key.shape[0], -1).transpose(0, 1)

    def fit_layers(self) -> None:
        """Every layer's scorer."""
        for layer in self.layers:
            if not self.store.has(f"layer-{layer}"):
                with self.progress.task(f"fit layer {layer}"):
                    self._fit_layer(layer)
            self._say(layer)

    def _report(self, layer: int) -> LayerReport:
        return LayerReport(**self.store.record(f"layer-{layer}"))

    def _say(self, layer: int) -> None:
        report = self._report(layer)
        refined = report.refinement
        self.progress.say(
            f"layer {layer}: loss {report.loss:.4f}; at {SHARE:.0%} of the context keeps "
            f"{report.recall:.1%} of far attention, {report.answer_recall:.1%} of answers'"
            + (f"; error of outputs {refined[0]:.4f} to {refined[-1]:.4f}" if refined else "")
        )

    def _fit_layer(self, layer: int) -> None:
        x, targets = self._layer(layer, self.training)
        scorer, losses = fit_layer(x, targets, self.capturing.gap, self.solve)
        refinement = []
        if self.settings.refine == "outputs":
            attention = attention_layers(self.model)[layer]
            tokens, solve = self.settings.window_tokens, self.solve
            refinement = refine_outputs(
                scorer, x, [self._sampled(layer, index) for index in self.training],
                attention.o_proj, [self._budget(share, tokens) for share in solve.shares],
                attention.scaling, self.settings.refine_steps, solve.seed,
            )  # fmt: skip
        self._keep(layer, scorer, losses, refinement)

    def _sampled(self, layer: int, index: int) -> Sampled:
        view = self.store.read(f"window-{index}", f"{layer}.")
        asks = torch.zeros(view["key"].shape[1], dtype=torch.bool)
        for first, end in self.windows[index].answers:
            asks[first:end] = True
        view["asks"] = asks[view["at"]]
        names = ("query", "at", "output", "asks", "key", "value")
        return Sampled(**{name: view[name].to(self.device) for name in names})

    def _budget(self, share: float, tokens: int) -> Budget:
        """The budget that keeps a share of ``tokens``."""
        return self.solve.split.budget(int(share * tokens), REFRESH)

    def _keep(
        self, layer: int, scorer: LayerScorer, losses: list[float], refinement: list[float]
    ) -> None:
        """Judge a layer's scorer by the windows held out, and store it."""
        split = self.solve.split
        x, targets = self._layer(layer, self.held_out)
        with torch.no_grad():
            scores = scorer(scorer.normalise(x))
        recall, answer_recall = kept_share(scores, targets, SHARE, split)
        report = LayerReport(
            layer, losses, dropped(scores, targets, self.solve.shares, split).item(),
            recall.item(), answer_recall.item(), refinement,
        )  # fmt: skip
        tensors = {f"file.{name}": tensor for name, tensor in scorer.tensors().items()}
        state = {f"state.{name}": tensor for name, tensor in scorer.state_dict().items()}
        found = {**tensors, **state, "curve": curve(scores, targets, SHARE, split)}
        self.store.write(f"layer-{layer}", found, asdict(report))

    def refine_logits(self) -> None:
        """Train all layers' scorers together by what the model loses."""
        settings, steps = self.settings, self.settings.refine_steps
        tokens = min(REFINE_TOKENS[self.kind], settings.window_tokens)
        states = {layer: self.store.read(f"layer-{layer}", "state.") for layer in self.layers}
        scorers = {
            layer: LayerScorer(
                state["mean"], state["std"], settings.solve.hidden_units, settings.solve.seed
            ).to(self.device)
            for layer, state in states.items()
        }
        for layer, scorer in scorers.items():
            scorer.load_state_dict(states[layer])
        training = LogitsRefinement(
            self.model, scorers, self._features, self.capturing.hidden,
            [self._budget(share, tokens) for share in JUDGED], steps,
        )  # fmt: skip
        if self.store.has("refine"):
            training.load(self.store.read("refine"), self.store.record("refine"))
        self.progress.more(-(-(steps - len(training.losses)) // REFINE_KEPT))
        while (done := len(training.losses)) < steps:
            end = min(steps, done + REFINE_KEPT)
            with self.progress.task(f"refine all layers, steps {done + 1} to {end} of {steps}"):
                for step in range(done, end):
                    training.step(
                        refinement_window(
                            self.tokenizer, self.texts, tokens, settings.solve.seed, step
                        )
                    )
                self.store.write("refine", training.state(), training.losses)
            self.progress.say(f"divergence from dense {fmean(training.losses[done:]):.4f}")
        for layer, scorer in scorers.items():
            self._keep(layer, scorer, self._report(layer).losses, [])
            self._say(layer)

    def report(self, splits: list[SplitReport]) -> FitReport:
        """How everything went."""
        layers = [self._report(layer) for layer in self.layers]
        if self.store.has("refine"):
            return FitReport(layers, self.store.record("refine"), splits)
        steps = zip(*(report.refinement for report in layers), strict=True)
        return FitReport(layers, [fmean(losses) for losses in steps], splits)

    def split_budget(self) -> list[SplitReport]:
        """Ways to split the budget over layers and KV heads, one of them kept."""
        curves = torch.stack([self.store.read(f"layer-{layer}")["curve"] for layer in self.layers])
        even = self._budget(SHARE, self.probe_tokens)
        damage = self._measured("damage", f"{len(self.layers)} layers' damage", [even], False)
        damage = damage[:, 0, 0]
        given = {"layers": allocate(curves, damage, by_head=False)}
        if curves.shape[1] > 1:
            given["heads"] = allocate(curves, damage)
        if self.settings.measure_heads:
            parts = [replace(even, k=max(1, round(even.k * part))) for part in PARTS]
            damage = self._measured("heads", "every KV head's damage", parts, True)
            totals = [self._budget(share, self.probe_tokens).k / even.k for share in JUDGED]
            everything = (self.probe_tokens - even.sinks - even.window) / even.k
            for name, most in (("measured", MOST_SHARE), ("measured, wide", 2 * MOST_SHARE)):
                given[name] = allocate_measured(damage, PARTS, everything, totals, most)
        splits = self._judge(given)
        for split in splits:
            self.progress.say(
                f"budgets by {split}, divergence of windows held out"
                + (" (kept)" if split.kept else "")
            )
        kept = next(split for split in splits if split.kept)
        for layer, heads in enumerate(kept.shares):
            self.progress.say(
                f"layer {layer}: budget by KV head " + " ".join(f"{share:.2f}" for share in heads)
            )
        return splits

    def _measured(self, step: str, what: str, budgets: list[Budget], by_head: bool) -> torch.Tensor:
        """The damage of layers or heads, measured once."""
        if not self.store.has(step):
            with self.progress.task(f"measure {what}") as tick:
                found = measure_damage(
                    self.model, self.probes, self._scores(), self.capturing.hidden, self.layers,
                    budgets, by_head, tick,
                )  # fmt: skip
                self.store.write(step, {"damage": found})
        return self.store.read(step)["damage"]

    def _judge(self, given: dict[str, torch.Tensor]) -> list[SplitReport]:
        """Judge splits [layers, H]: the one with the least divergence is kept."""
        layers = self.model.config.get_text_config().num_hidden_layers
        shares = torch.zeros(len(given), layers, next(iter(given.values())).shape[1])
        shares[:, self.layers] = torch.stack(list(given.values()))
        if not self.store.has("splits"):
            budgets = [[self._split(share, split) for share in JUDGED] for split in shares.tolist()]
            self.progress.more(1)
            with self.progress.task(f"try {len(given)} splits of the budget") as tick:
                lost = measure_splits(
                    self.model, self.judges, self._scores(), self.capturing.hidden, budgets, tick
                )
                self.store.write("splits", {"divergence": torch.tensor(lost, dtype=torch.float64)})
        found = self.store.read("splits")["divergence"]
        # every share counts the same; of equals the first
        best = int((found / found[0].clamp_min(1e-12)).mean(1).argmin())
        return [
            SplitReport(name, at == best, found[at].tolist(), shares[at].tolist())
            for at, name in enumerate(given)
        ]

    def _split(self, share: float, shares: list[list[float]]) -> dict[int, Budget]:
        """What every layer reads at a share of the windows that judge."""
        budgets = split_budget(
            self._budget(share, self.judge_tokens), tuple(map(tuple, shares)), (),
            self.judge_tokens,
        )  # fmt: skip
        return {layer: budget for layer, budget in enumerate(budgets) if budget is not None}

    def _scores(self) -> Score:
        """Scores by the scorers fitted so far."""
        path = self.store.folder / "scorer.safetensors"
        save_scorer(path, self.scorer_file([]))
        heads, _, head_dim = self.store.read("window-0", f"{self.layers[0]}.")["key"].shape
        width = self.model.config.get_text_config().hidden_size
        scorers = {
            layer: load_layer(str(path), layer, heads, head_dim, None, self.device, width)
            for layer in self.layers
        }

        def score(
            layer: int, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor | None
        ) -> torch.Tensor:
            position = torch.arange(key.shape[0], device=key.device)
            return scorers[layer].score(key, value, position, hidden)

        return score

    def scorer_file(self, splits: list[SplitReport]) -> ScorerFile:
        """Everything fitted so far, as the file holds it, with the split that was kept."""
        layers = {layer: self.store.read(f"layer-{layer}", "file.") for layer in self.layers}
        header = ScorerHeader(
            kind="mlp" if self.settings.solve.hidden_units else "linear",
            features=self.features,
            rope="neox" if self.rope is not None else None,
            model=self.fingerprint,
        )
        shares, extra = None, {}
        for split in splits:
            if split.kept:
                shares = torch.tensor(split.shares)
                tried = "; ".join(map(str, splits))
                extra = {"budgets": f"by {split.name}; divergence from dense, held out: {tried}"}
        return ScorerFile(
            header, layers, None if self.rope is None else self.rope.inv_freq, shares,
            self.source, self.settings.solve.seed, extra,
        )  # fmt: skip


def _held_out(windows: list[Window]) -> list[int]:
    """The last plain and the last retrieval window, if others of their kind are left."""
    kinds = [
        [i for i, w in enumerate(windows) if bool(w.answers) == asked] for asked in (False, True)
    ]
    return [kind[-1] for kind in kinds if len(kind) > 1] or [0]
