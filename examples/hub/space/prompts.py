"""Prompts to begin with: first pages of novels for `prose`, needles in a haystack for `retriever`."""

from __future__ import annotations

from dataclasses import dataclass

from engine import HARD, load

from hf_certkv.embedded import make_haystack

# Herman Melville, Moby-Dick (1851), and Jane Austen, Pride and Prejudice (1813): in the public domain.
MOBY_DICK = """Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and \
nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of the world. It is \
a way I have of driving off the spleen and regulating the circulation. Whenever I find myself growing grim about the mouth; \
whenever it is a damp, drizzly November in my soul; whenever I find myself involuntarily pausing before coffin warehouses, and \
bringing up the rear of every funeral I meet; and especially whenever my hypos get such an upper hand of me, that it requires \
a strong moral principle to prevent me from deliberately stepping into the street, and methodically knocking people's hats \
off, then, I account it high time to get to sea as soon as I can. This is my substitute for pistol and ball. With a \
philosophical flourish Cato throws himself upon his sword; I quietly take to the ship. There is nothing surprising in this. If \
they but knew it, almost all men in their degree, some time or other, cherish very nearly the same feelings towards the ocean \
with me.

There now is your insular city of the Manhattoes, belted round by wharves as Indian isles by coral reefs; commerce surrounds \
it with her surf. Right and left, the streets take you waterward. Its extreme downtown is the battery, where that noble mole \
is washed by waves, and cooled by breezes, which a few hours previous were out of sight of land. Look at the crowds of \
water-gazers there."""

PRIDE_AND_PREJUDICE = """It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in \
want of a wife.

However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so well \
fixed in the minds of the surrounding families, that he is considered as the rightful property of some one or other of their \
daughters.

"My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park is let at last?"

Mr. Bennet replied that he had not.

"But it is," returned she; "for Mrs. Long has just been here, and she told me all about it."

Mr. Bennet made no answer.

"Do not you want to know who has taken it?" cried his wife impatiently.

"You want to tell me, and I have no objection to hearing it."

This was invitation enough.

"Why, my dear, you must know, Mrs. Long says that Netherfield is taken by a young man of large fortune from the north of \
England; that he came down on Monday in a chaise and four to see the place, and was so much delighted with it that he agreed \
with Mr. Morris immediately; that he is to take possession before Michaelmas, and some of his servants are to be in the house \
by the end of next week."

"What is his name?"

"Bingley."

"Is he married or single?"

"Oh, single, my dear, to be sure! A single man of large fortune; four or five thousand a year. What a fine thing for our \
girls!"

"How so? how can it affect them?"

"My dear Mr. Bennet," replied his wife, "how can you be so tiresome!"
"""


@dataclass(frozen=True)
class Example:
    """A prompt, the model it is for, tokens to write, and a name to click on."""

    label: str
    prompt: str
    model: str
    new_tokens: int


def needle_question(tokens: int, seed: int, needle: int, needles: int = 20) -> tuple[str, str]:
    """A haystack that ends with the question for one of its needles, as words, and the right answer's word."""
    haystack = make_haystack(load("retriever")[1], tokens, needles, seed)
    words = load("retriever")[1].convert_ids_to_tokens(haystack.prompt(needle)[0].tolist())
    return " ".join(words), haystack.needles[needle].value


def examples() -> list[Example]:
    """The prompts offered. The last was chosen because the naive cache answers it wrongly with 4-bit values."""
    return [
        Example("Moby-Dick, first page", MOBY_DICK, "prose", 48),
        Example("Pride and Prejudice, first page", PRIDE_AND_PREJUDICE, "prose", 48),
        Example("A needle in 2,000 words", needle_question(2000, seed=0, needle=7)[0], "retriever", 16),
        Example("A hard needle in 4,000 words", needle_question(4096, seed=1, needle=8)[0], HARD, 16),
    ]
