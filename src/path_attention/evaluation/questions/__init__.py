"""Questions about long texts, made on this machine: RULER's synthetic tasks, phone books, BABILong-style stories.

Each kind of question is a function of a seed, a number and an amount of text; the amount is chosen so that question and
answer fill a length in tokens. The tasks are those of RULER (arXiv 2404.06654), Jelassi et al. (arXiv 2402.01032) and
BABILong (arXiv 2406.10149) in what is asked, how much of it and how it is scored; words and sentences are our own, so
that nothing has to be fetched. Scores can be compared between models here, not with published ones.
"""

from path_attention.evaluation.questions.base import Kind, Question, fitting, kind, kind_names
from path_attention.evaluation.questions.needles import Needles
from path_attention.evaluation.questions.phone_book import PhoneBook
from path_attention.evaluation.questions.stories import Story
from path_attention.evaluation.questions.variables import VariableTracking
from path_attention.evaluation.questions.words import CommonWords, FrequentWords

__all__ = [
    "CommonWords",
    "FrequentWords",
    "Kind",
    "Needles",
    "PhoneBook",
    "Question",
    "Story",
    "VariableTracking",
    "fitting",
    "kind",
    "kind_names",
]
