"""Write the questions of the tasks that `llmq eval --tasks` runs without a network.

    python scripts/local_tasks.py

All questions were written for llmq. Those of `llmq_grammar` and `llmq_sums` are made from lists of words and numbers
with a fixed seed, so the files are always the same.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "llmq" / "evaluation" / "local_tasks"
Question = tuple[str, list[str]]  # the text, and its continuations, of which the first is right

NOUNS = ("key/keys", "letter/letters", "teacher/teachers", "boat/boats", "picture/pictures", "child/children",
         "window/windows", "horse/horses", "story/stories", "doctor/doctors", "knife/knives", "fork/forks")  # fmt: skip
PLACES = ("near", "behind", "next to", "in front of", "below")
AFTER = ("very old", "quite expensive", "not ready", "here today", "rather small")
PEOPLE = {"herself": ("girl", "woman", "queen", "mother", "aunt"), "himself": ("boy", "man", "king", "father", "uncle")}
DEEDS = ("blamed", "taught", "saw", "hurt", "praised", "described")
PARTICIPLES = ("eaten/ate the bread", "written/wrote a letter", "taken/took the bus", "broken/broke the cup",
               "seen/saw the film", "drunk/drank the milk", "given/gave an answer", "forgotten/forgot her name",
               "sung/sang a song", "chosen/chose a colour", "driven/drove home", "known/knew it for years")  # fmt: skip
TIMES = ("already", "never", "often", "just")


def grammar(chance: random.Random) -> Iterator[Question]:
    """A right and a wrong form in the same place."""
    pairs = [noun.split("/") for noun in NOUNS]
    for one, many in pairs:
        for other, others in chance.sample([pair for pair in pairs if pair[0] != one], 4):
            place, rest = chance.choice(PLACES), chance.choice(AFTER)
            yield f"The {one} {place} the {others}", [f" is {rest}.", f" are {rest}."]
            yield f"The {many} {place} the {other}", [f" are {rest}.", f" is {rest}."]
        yield "She has lost this", [f" {one}.", f" {many}."]
        yield "She has lost these", [f" {many}.", f" {one}."]
    for right, people in PEOPLE.items():
        wrong = next(word for word in PEOPLE if word != right)
        for person in people:
            for deed in chance.sample(DEEDS, 3):
                yield f"The {person} {deed}", [f" {right}.", f" {wrong}."]
    for text in PARTICIPLES:
        forms, rest = text.split(" ", 1)
        right, wrong = forms.split("/")
        for when in chance.sample(TIMES, 2):
            yield f"They have {when}", [f" {right} {rest}.", f" {wrong} {rest}."]


def sums(chance: random.Random) -> Iterator[Question]:
    """Sums and differences with two digits; the wrong answers are near, and have two digits, too."""
    for _ in range(100):
        result, b = chance.randint(20, 88), chance.randint(2, 11)
        sign, a = ("+", result - b) if chance.random() < 0.5 else ("-", result + b)
        near = [result - 10, result - 1, result + 1, result + 2, result + 10]
        yield f"Question: What is {a} {sign} {b}?\nAnswer:", [f" {n}" for n in (result, *chance.sample(near, 3))]


# Text | right | wrong | ...
SENSE = """
The opposite of hot is | cold | warm | wet | loud
The opposite of early is | late | soon | first | quick
A year has twelve | months | weeks | days | hours
A week has seven | days | months | hours | years
The sun rises in the | east | west | north | south
Water freezes and becomes | ice | steam | sand | smoke
Bees make | honey | milk | bread | silk
A baby dog is called a | puppy | kitten | calf | foal
A baby cat is called a | kitten | puppy | chick | lamb
The capital of France is | Paris | Madrid | London | Vienna
The capital of Japan is | Tokyo | Seoul | Peking | Hanoi
The capital of Italy is | Rome | Athens | Lisbon | Berlin
Fish breathe with their | gills | wings | feathers | paws
We see with our | eyes | ears | hands | knees
We hear with our | ears | eyes | noses | elbows
A triangle has three | sides | wheels | legs | pages
Bread is made from | flour | glass | wool | coal
Wine is made from | grapes | potatoes | olives | wheat
The colour of grass is | green | purple | pink | silver
The colour of snow is | white | black | orange | brown
A carpenter works with | wood | bread | hair | teeth
A dentist takes care of | teeth | cars | roofs | gardens
A baker makes | bread | shoes | clocks | maps
Birds lay their eggs in a | nest | pocket | letter | mirror
The heart pumps | blood | air | light | sound
Plants need water and | light | paint | music | money
In winter it is colder than in | summer | January | the fridge | December
An hour has sixty | minutes | seconds | days | weeks
The moon goes around the | Earth | Sun | stars | clouds
To cut paper you use | scissors | a spoon | a pillow | a bucket
To open a locked door you need a | key | fork | comb | stamp
She was thirsty, so she drank some | water | bread | paper | sand
He was tired, so he went to | bed | war | lunch | court
It was raining, so they took an | umbrella | apple | orchestra | opinion
The cup fell on the stone floor and | broke | sang | melted | grew
She forgot her coat, and outside she felt | cold | rich | tall | purple
He did not study, so he failed the | exam | kitchen | weather | river
The battery was empty, so the phone turned | off | blue | around | sour
They planted a seed, and after some weeks a flower | grew | spoke | drove | cooked
She read the letter again because it was not | clear | edible | asleep | thirsty
The bread was old and too hard to | eat | wear | sing | marry
The road was icy, so the car went very | slowly | deliciously | politely | loudly
He could not see anything, because the room was | dark | honest | Tuesday | sweet
The soup was too hot, so she waited until it was | cooler | louder | taller | younger
They missed the train because they arrived too | late | tall | green | empty
He put on his glasses to | read | sleep | swim | sneeze
The dog barked at the | stranger | idea | Monday | temperature
She lit a candle because the lights had gone | out | up | fishing | shopping
The ice on the lake was thin, so nobody walked on | it | them | him | us
The baby was crying because it was | hungry | rectangular | famous | electric
""".strip()  # fmt: skip
PYTHON = r"""
for index in range(|10):|10]:|10;:
if name is not|None:|none:|null:
def area(width, height):\n    return width *| height| weight| with
class Point:\n    def __init__(|self, x, y):|x, y, self):|this, x, y):
with open(path) as|file:|= file:|:file
import os\n\nprint(os.|getcwd())|upper())|append())
values = [3, 1, 2]\nvalues.|sort()|sorted()|upper()
text = "a,b,c"\nparts = text.|split(",")|append(",")|keys(",")
numbers = []\nnumbers.|append(1)|add(1)|push(1)
try:\n    number = int(text)\nexcept|ValueError:|ValueError;|:ValueError
raise ValueError(|"negative number")|"negative number"]|"negative number"}
count = 0\ncount +=| 1| = 1|+ 1
names = {"a": 1}\nfor key, value in names.|items():|append():|strip():
while True:\n    line = read()\n    if not line:\n        |break|else|import
from collections import|defaultdict|from|class
import|json|for|while
def is_even(number):\n    return number % 2 ==| 0| 2| 3
def is_odd(number):\n    return number % 2 ==| 1| 2| 5
squares = [x * x for x in|range(5)]|range(5))|range(5)}
pairs = {key: len(key) for key in|words}|words]|words)
def largest(values):\n    return|max(values)|min(values)|len(values)
def smallest(values):\n    return|min(values)|max(values)|sum(values)
def mean(values):\n    return sum(values) /| len(values)| max(values)| int(values)
def last(values):\n    return values[|-1]|1]|0]
def first(values):\n    return values[|0]|1]|-1]
if x == 1:\n    pass\nelif|x == 2:|x = 2:|x == 2;
print(f"{name|}")|]")|)")
assert len(values) ==| 3| = 3|: 3
lines = text.|splitlines()|sort()|keys()
path = os.path.|join(folder, name)|append(folder, name)|add(folder, name)
sys.exit(|1)|1]|1}
def __len__(self):\n    return|len(self.items)|print(self.items)|self.items = 1
@property\n|def size(self):|size(self):|class size(self) def
@staticmethod\n|def make(value):|return make(value):|import make(value):
lambda x|: x + 1|= x + 1|( x + 1
a, b =| b, a| b; a| b a
global|counter|"counter"|[counter]
del|values[0]|(values[0]|=values[0]
if not isinstance(value,| str):| str;| "str" in:
yield|item|;item|:item
""".strip()


def written(text: str) -> Iterator[Question]:
    """The questions of a list, whose words are separated by spaces from the text."""
    for line in text.splitlines():
        question, *choices = line.split(" | ")
        yield question, [f" {choice}" for choice in choices]


def code() -> Iterator[Question]:
    """Python code, and how it goes on; a word after a word is separated by a space."""
    for line in PYTHON.splitlines():
        question, *choices = line.replace("\\n", "\n").split("|")
        space = " " if question[-1].isalpha() and choices[0][0].isalnum() or question[-1] == "," else ""
        yield question, [choice if choice.startswith(" ") else f"{space}{choice}" for choice in choices]


def require_no_prefix(choices: list[str]) -> None:
    """A text is never more probable than its beginning."""
    for choice in choices:
        if any(other != choice and other.startswith(choice) for other in choices):
            raise ValueError(f"{choice!r} is the beginning of another choice, expected different ones")


def lines(questions: Iterator[Question], chance: random.Random) -> str:
    """One JSON document per line, with the right answer at any place."""
    rows = []
    for question, choices in questions:
        require_no_prefix(choices)
        mixed = chance.sample(choices, len(choices))
        rows.append({"question": question, "choices": mixed, "answer": mixed.index(choices[0])})
    return "".join(json.dumps(row) + "\n" for row in rows)


def files() -> dict[str, str]:
    """The text of each file by its name."""
    chance = random.Random(0)
    made = {"grammar": grammar(chance), "sums": sums(chance), "sense": written(SENSE), "python": code()}
    return {f"llmq_{name}.jsonl": lines(questions, chance) for name, questions in made.items()}


def main() -> None:
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"{name}: {text.count(chr(10))} questions")


if __name__ == "__main__":
    main()
