"""Efforts: what `kvmix eval` measures where it is not told."""

from dataclasses import dataclass, replace

from kvmix_compile.evaluate.passkey import DEPTHS
from kvmix_compile.evaluate.passkey import LENGTHS as PASSKEY_LENGTHS
from kvmix_compile.evaluate.tasks import LENGTHS as TASK_LENGTHS
from kvmix_compile.evaluate.tasks import QUESTIONS


@dataclass(frozen=True)
class Effort:
    """How much is measured; a number or list that is empty leaves that measurement out.

    tokens: of each text. decode: of texts that the original writes. ways: of a text that comes in several ways.
    writing: of texts that each configuration writes. drafts: whether tokens are proposed.
    exact_chunks: whether each budget is measured with exact chunks, too.
    """

    tokens: int = 4096
    baselines: tuple[str, ...] = ()
    decode: int = 0
    passkey_lengths: tuple[int, ...] = ()
    passkey_depths: tuple[float, ...] = DEPTHS
    tasks: tuple[str, ...] = ()
    task_lengths: tuple[int, ...] = TASK_LENGTHS
    task_questions: int = QUESTIONS
    ways: int = 0
    writing: int = 0
    drafts: bool = False
    exact_chunks: bool = False

    def with_options(self, **options: object) -> "Effort":
        """The same but for those that are told: not None, and no empty list."""
        told = {
            name: tuple(given) if isinstance(given, list) else given
            for name, given in options.items()
            if given not in (None, [])
        }
        return replace(self, **told)  # type: ignore[arg-type]


USUAL = Effort()
# Of SmolLM2-135M 93 seconds on two cores, of which measuring its layers is half.
QUICK = Effort(tokens=1024, passkey_lengths=(900,), passkey_depths=(0.25, 0.5, 0.75))
# Everything there is, of each a little. What is written and decoded has to be longer than what stays unquantized.
EVERYTHING = Effort(
    tokens=2048,
    baselines=("q4_0-hadamard",),
    decode=384,
    passkey_lengths=PASSKEY_LENGTHS,
    passkey_depths=(0.25, 0.75),
    tasks=("needle",),
    task_questions=4,
    ways=500,
    writing=320,
    drafts=True,
    exact_chunks=True,
)
