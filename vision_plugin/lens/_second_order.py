"""The second-order lens over many images: each component's first direction and its words.

Gandelsman, Efros and Steinhardt (ICLR 2025, arXiv 2406.04341), sections 3.3 and 4, for neurons, and
here for the latents of an SAE as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin._extras import require_sklearn
from vision_plugin._rich import Table
from vision_plugin.lens._pixels import pixel_batches
from vision_plugin.lens._second_order_reading import Writers, passage
from vision_plugin.lens._texts import centred, unit
from vision_plugin.models.dictionary import Dictionary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOP_IMAGES = 100
"""Images of the largest effect behind a component's direction (the paper's number)."""
MOST_COMPONENTS = 8192
"""Most components that are read at once."""


@dataclass(frozen=True)
class Words:
    """A sparse code of a direction.

    Attributes:
        texts: Texts, the largest coefficient first.
        coefficients: Their coefficients, negative for what the direction speaks against.
        explained: Share of the direction's squared length in the code.

    Examples:
        >>> found = vp.lens.second_order(model, pixels, 1, which=[0], progress=False)
        >>> texts = ["a red circle", "a blue square"]
        >>> words = found.words(0, model.encode_text(texts), texts, n_words=1)
        >>> len(words.texts)
        1
    """

    texts: tuple[str, ...]
    coefficients: tuple[float, ...]
    explained: float


@dataclass(frozen=True, eq=False)
class SecondOrder:
    """Second-order effects of components on images.

    Attributes:
        name: What the components are.
        which: Their numbers.
        amounts: What each image gives each later layer and head.
        maps: Where each component leads through each layer and head.
        n_top: Images of the largest effect that a direction is made of.
        model_name: Name of the model.

    Examples:
        >>> found = vp.lens.second_order(model, pixels, 1, which=[0, 1], progress=False)
        >>> found.effects(0).shape, found.which
        (torch.Size([8, 64]), (0, 1))
    """

    name: str
    which: tuple[int, ...]
    amounts: Float[Tensor, "n k r"]
    maps: Float[Tensor, "k r d"]
    n_top: int
    model_name: str

    def __len__(self) -> int:
        return len(self.which)

    def effects(self, component: int) -> Float[Tensor, "n d"]:
        """Return the effects of one component, by its number, on all images.

        Raises:
            ValueError: the component was not read.
        """
        if component not in self.which:
            raise ValueError(
                f"{component} was not read: {self.name} that were are {self.which[:8]}"
            )
        place = self.which.index(component)
        return self.amounts[:, place].double() @ self.maps[place].double()

    def top_images(self, component: int) -> Tensor:
        """Return the places of the images whose effect is farthest from the mean, in order."""
        away = centred(self.effects(component)).norm(dim=1)
        return torch.sort(away, descending=True, stable=True).indices[: self.n_top]

    def direction(self, component: int) -> Float[Tensor, " d"]:
        """Return the component's first direction, of norm one.

        It is the first right singular vector of the effects on the top images, not centred, with
        the sign that most of these effects have.
        """
        top = self.effects(component)[self.top_images(component)]
        vector: Tensor = torch.linalg.svd(top, full_matrices=False).Vh[0]
        return -vector if float((top @ vector).sign().sum()) < 0 else vector

    def explained(self, component: int) -> float:
        """Return the share of the effects' variance over all images along the direction."""
        away = centred(self.effects(component))
        along = (away @ self.direction(component)).square().sum()
        return float(along / away.square().sum().clamp(min=1e-300))

    def words(
        self,
        component: int,
        texts: Float[Tensor, "v d"],
        names: Sequence[str],
        *,
        n_words: int = 8,
        solver: Literal["omp", "lasso"] = "omp",
        alpha: float = 1e-3,
    ) -> Words:
        """Return the component's direction as a sparse sum of texts.

        Text embeddings are taken less their mean and brought to norm one. (The authors' code
        divides each dimension by its norm over the texts instead; this is the text's own norm.)

        Args:
            component: Number of the component.
            texts: Text embeddings.
            names: The texts.
            n_words: Most texts in the code.
            solver: Orthogonal matching pursuit, or scikit-learn's Lasso.
            alpha: Weight of Lasso's penalty.

        Raises:
            ValueError: there are too few texts, or the solver is unknown.
            ImportError: scikit-learn is missing.
        """
        if len(texts) < 2 or len(texts) != len(names):
            raise ValueError(
                f"texts= holds {len(texts)} embeddings and names= {len(names)} texts: give a name "
                "for each, at least two"
            )
        require_sklearn("sparse codes of directions")
        from sklearn.linear_model import Lasso, orthogonal_mp

        atoms = unit(centred(texts.double())).cpu()
        target = self.direction(component).cpu()
        if solver == "omp":
            most = min(n_words, *atoms.shape)
            code = torch.as_tensor(
                orthogonal_mp(atoms.T.numpy(), target.numpy(), n_nonzero_coefs=most)
            )
        elif solver == "lasso":
            fit = Lasso(alpha=alpha, fit_intercept=False, max_iter=10_000)
            code = torch.as_tensor(fit.fit(atoms.T.numpy(), target.numpy()).coef_)
        else:
            raise ValueError(f"solver={solver!r} is none of 'omp' and 'lasso'")
        order = torch.sort(code.abs(), descending=True, stable=True).indices[:n_words]
        order = order[code[order] != 0]
        left = target - code @ atoms
        return Words(
            tuple(str(names[place]) for place in order.tolist()),
            tuple(code[order].tolist()),
            1.0 - float(left.square().sum()),
        )

    def strength(self) -> Float[Tensor, " k"]:
        """Return the mean length of each component's effect."""
        lengths = [self.effects(component).norm(dim=1).mean() for component in self.which]
        return torch.stack(lengths)

    def to_dict(
        self, texts: Tensor | None = None, names: Sequence[str] = (), *, n_words: int = 8
    ) -> dict[str, Any]:
        """Return strength, first direction's share and words by component, ready for JSON."""
        found = []
        strength = self.strength().tolist()
        for place, component in enumerate(self.which):
            entry: dict[str, Any] = {
                "component": component,
                "strength": strength[place],
                "explained": self.explained(component),
            }
            if texts is not None:
                words = self.words(component, texts, names, n_words=n_words)
                entry["words"] = list(zip(words.texts, words.coefficients, strict=True))
            found.append(entry)
        return {
            "name": self.name,
            "model_name": self.model_name,
            "n_images": len(self.amounts),
            "components": found,
        }

    def table(
        self,
        texts: Tensor | None = None,
        names: Sequence[str] = (),
        *,
        n_words: int = 4,
        n: int | None = 20,
    ) -> Table:
        """Return a row for each of the strongest components, for ``rich`` to print.

        Args:
            texts: Text embeddings for the words.
            names: The texts.
            n_words: Words of each component.
            n: Components to show; None shows all.
        """
        table = Table(title=f"{self.name}, {len(self.amounts):,} images, {self.model_name}")
        for heading in ("number", "strength", "first direction\nexplains"):
            table.add_column(heading, justify="right")
        table.add_column("words")
        entries = self.to_dict(texts, names, n_words=n_words)["components"]
        for entry in sorted(entries, key=lambda entry: -entry["strength"])[:n]:
            words = ", ".join(f"{text} {value:+.2f}" for text, value in entry.get("words", ()))
            cells = (f"{entry['strength']:.4f}", f"{entry['explained']:.2f}")
            table.add_row(str(entry["component"]), *cells, words)
        return table

    def plot(self) -> Figure:
        """Return a figure: what the first direction explains, against the strength."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        shares = [self.explained(component) for component in self.which]
        axes.scatter(self.strength().tolist(), shares, s=8)
        axes.set(title=self.name, xlabel="mean length of the effect", ylim=(0, 1.02))
        axes.set_ylabel("share of the first direction")
        return figure


def second_order(
    model: Any,
    images: Any,
    source: int | Dictionary,
    *,
    which: Sequence[int] | None = None,
    n_top: int = TOP_IMAGES,
    batch_size: int = 16,
    progress: bool = True,
) -> SecondOrder:
    """Read the second-order effects of neurons or latents on images.

    Args:
        model: A VisionBridge with a class token.
        images: Whatever ``open_images`` takes, or pixels.
        source: Number of a layer, whose MLP's neurons are meant, or an SAE at the residual stream.
        which: Numbers of the neurons or latents; None takes all.
        n_top: Images of the largest effect that a direction is made of.
        batch_size: Images at once.
        progress: Whether to show a progress bar.

    Raises:
        UnsupportedModelError: the tower has no class token, or heads that cannot be followed.
        ValueError: there is no such layer or component, or there are too many.

    Examples:
        >>> found = vp.lens.second_order(model, pixels, sae, which=[12, 13], progress=False)
        >>> found.direction(12).shape
        torch.Size([64])
    """
    writers = Writers(model, source, which)
    if len(writers.which) > MOST_COMPONENTS:
        raise ValueError(
            f"{writers.name} are {len(writers.which):,}: name at most {MOST_COMPONENTS:,} of them "
            "with which="
        )
    maps: Tensor | None = None
    amounts = []
    for _, pixels in pixel_batches(
        model, images, batch_size=batch_size, title="following", progress=progress
    ):
        found = passage(model, pixels, writers, maps=maps)
        maps = found.maps
        amounts.append(found.amounts.cpu())
    assert maps is not None  # pixel_batches has seen an image
    return SecondOrder(
        writers.name,
        writers.which,
        torch.cat(amounts),
        maps.cpu(),
        n_top,
        str(model.cfg.model_name),
    )
