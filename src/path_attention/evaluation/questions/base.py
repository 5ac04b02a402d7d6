"""What a kind of question is, the table of those there are, and how one is made to fill a length."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

# What a haystack is made of where no text is given.
NOISE = (
    "The river runs to the sea.",
    "Stones lie where they fell.",
    "The road goes up and down.",
    "A wind comes and a wind goes.",
    "Day follows night again.",
)
_ADJECTIVES = """
amber ancient bitter blue bold brave brief bright broad calm careful cheap clean clever cold cool crisp
curious damp dark dear deep dry dull eager early easy empty fair faint fast fine firm flat fond fresh gentle
glad golden grand grave great green happy hard heavy high honest huge humble idle keen kind large late lazy
light little lively long loud low lucky mild narrow neat new noble odd old pale plain proud quick quiet rare
raw red rich ripe rough round sad safe sharp short shy silent silver simple slow small smooth soft sour spare
steady steep stiff strange strong sudden sweet swift tall tame thick thin tidy tiny tough vast warm wary weak
wide wild wise wooden young
"""
_NOUNS = """
acorn anchor apple arrow badge barn basket beacon bell bench bird blanket boat bottle branch bread bridge
brook broom bucket button cabin candle canoe carpet castle cellar chain chair cherry chimney circle cloud coat
coin comb compass copper corner cradle crown cup curtain desk door dragon drum eagle engine falcon farm
feather fence ferry field finger flag flame flute forest fountain fox garden gate ginger glove goose grape
guitar hammer harbor hat hawk hedge helmet hill honey horn horse island jacket jar kettle key kitten ladder
lake lamp lantern leaf lemon letter lily lion lock magnet maple marble market mask meadow melon mirror mitten
moon mountain mouse needle nest oak oar onion orchard otter owl paddle palace parrot path pear pebble pencil
pepper piano pillow pine planet plough pocket pond potato puzzle quilt rabbit raven ribbon ring robin rocket
rope rose saddle sail salmon sandal scarf shell shield ship shovel sparrow spoon spring squirrel stable star
statue stove stream sugar swan table teapot temple thimble thread tiger tower trail tree trumpet tulip tunnel
turtle valley velvet violin wagon walnut well whale wheel willow window wolf
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())


class Question(NamedTuple):
    """A question about a text.

    Args:
        prompt: the text and the question.
        prefix: how the answer begins; given to the model.
        answers: what is asked for, or all that is.
        place: of the first of what answers it, as a share of the text, in [0, 1].
    """

    prompt: str
    prefix: str
    answers: tuple[str, ...]
    place: float


class Kind(ABC):
    """A kind of question.

    Attributes:
        new_tokens: room for the answer.
        until: texts at which the answer ends, beside the model's own end.
        haystack: sentences to hide things among; NOISE unless a text is given.
    """

    new_tokens: int
    until: tuple[str, ...] = ()
    haystack: Sequence[str] = NOISE

    @abstractmethod
    def make(self, random: Random, size: int) -> Question:
        """A question about ``size`` units of text: sentences, entries, words."""

    @property
    def smallest(self) -> int:
        """The fewest units that hold what is asked."""
        return 1

    def score(self, output: str, answers: Sequence[str]) -> float:
        """In [0, 1]: by default the share of the answers that the output contains."""
        return sum(answer.lower() in output.lower() for answer in answers) / len(answers)

    def sentences(self, random: Random, count: int) -> list[str]:
        """A stretch of the haystack, which is gone through again where it is too short."""
        start = random.randrange(len(self.haystack))
        return [self.haystack[(start + n) % len(self.haystack)] for n in range(count)]


_KINDS: dict[str, Callable[[], Kind]] = {}


def register(name: str, make: Callable[[], Kind]) -> None:
    """Makes a kind known by a name."""
    assert name not in _KINDS
    _KINDS[name] = make


def kind_names() -> tuple[str, ...]:
    """All names, in order of registration."""
    return tuple(_KINDS)


def kind(name: str) -> Kind:
    """A kind by its name.

    Raises:
        ValueError: there is none.
    """
    if name not in _KINDS:
        raise ValueError(f"tasks: no questions {name!r}; there are {', '.join(_KINDS)}")
    return _KINDS[name]()


def fitting(
    name: str, of: Kind, count_tokens: Callable[[str], int], length: int, *, seed: int, samples: int
) -> list[Question]:
    """``samples`` questions that fill a length: with its answer, none is longer, and none could hold much more text.

    Args:
        name: of the kind; part of the seed.
        of: the kind.
        count_tokens: of a text, special tokens included.
        length: in tokens.
        seed: question n is a function of (name, length, seed, n).
        samples: how many.

    Raises:
        ValueError: not even the smallest question fits.
    """

    def made(number: int, size: int) -> Question:
        return of.make(Random(f"{name} {length} {seed} {number}"), size)

    def fits(number: int, size: int) -> bool:
        question = made(number, size)
        return count_tokens(question.prompt + question.prefix) + of.new_tokens <= length

    low = of.smallest
    if not fits(0, low):
        raise ValueError(
            f"lengths: wanted more than {length} tokens, which do not hold the shortest question of {name}"
        )
    high = 2 * low
    while fits(0, high):
        low, high = high, 2 * high
    while high - low > max(1, low // 50):  # within 2 % of what would fit
        middle = (low + high) // 2
        low, high = (middle, high) if fits(0, middle) else (low, middle)
    found = []
    for number in range(samples):
        size = low
        while not fits(number, size):
            size = max(of.smallest, size - max(1, size // 50))
            if size == of.smallest and not fits(number, size):
                raise ValueError(f"lengths: wanted more than {length} tokens for question {number} of {name}")
        found.append(made(number, size))
    return found


def pairs(random: Random, count: int) -> list[str]:
    """Different words of the kind amber-lantern."""
    chosen = random.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[n // len(NOUNS)]}-{NOUNS[n % len(NOUNS)]}" for n in chosen]


def spread(random: Random, sentences: list[str], hidden: Sequence[str]) -> tuple[list[str], float]:
    """Sentences with others hidden among them, in their order; and where the first of those is."""
    places = sorted(random.randrange(len(sentences) + 1) for _ in hidden)
    for place, sentence in reversed(list(zip(places, hidden, strict=True))):
        sentences.insert(place, sentence)
    return sentences, places[0] / max(1, len(sentences)) if places else 0.0
