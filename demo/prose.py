"""Prose from templates: stories, reports and instructions in simple English."""

import random
import re
from collections.abc import Iterator

# A slot is drawn afresh at each use, except the hero and the town, which hold for one story.
SLOTS: dict[str, tuple[str, ...]] = {
    slot: tuple(words.split(", "))
    for slot, words in {
        "place": "market, library, kitchen, bakery, school, museum, theatre, workshop, office, "
        "church, guest house, bus stop, train yard, post office, book shop, flower "
        "shop, fish stall, toy shop, hospital, laundry, print shop, ferry",
        "thing": "letter, basket, lantern, map, coat, bottle, clock, violin, blanket, "
        "umbrella, notebook, bicycle, painting, key ring, wooden box, loaf of bread, "
        "pair of boots, cup of coffee, bag of apples, box of nails, camera, hat, "
        "spoon, chair, newspaper, scarf, suitcase, radio, kite, brush",
        "who": "baker, teacher, doctor, farmer, painter, librarian, carpenter, gardener, "
        "neighbour, driver, musician, cook, shopkeeper, student, clerk, mechanic, "
        "tailor, traveller, waiter, singer, visitor, nurse, butcher, writer",
        "quality": "heavy, empty, small, large, warm, cold, simple, strange, beautiful, "
        "ordinary, useful, old, new, green, white, red, grey, clean, soft, familiar, "
        "cheap, expensive, narrow, colourful",
        "feeling": "happy, tired, surprised, hungry, worried, relieved, cheerful, thoughtful, "
        "nervous, grateful, bored, angry",
        "when": "In the morning, After lunch, Before dawn, Late in the evening, On Monday, "
        "The next day, At noon, That night, A week later, Soon afterwards, Every "
        "Sunday, In the meantime, Last year, During the storm, One summer day, Many "
        "years ago",
        "weather": "rain, wind, fog, sunshine, heat, cold air, thick cloud, light snow, evening "
        "light, sea breeze",
        "how": "slowly, carefully, quickly, softly, kindly, happily, alone, together, at "
        "once, again, for hours, in silence",
        "many": "two, three, four, five, six, seven, eight, nine, ten, twelve",
        "food": "soup, bread, cheese, fruit, fish, rice, cake, porridge, stew, salad",
        "task": "cook, read, draw, swim, sing, write, paint, dance, sew, cycle",
    }.items()
}
_HEROES = tuple(
    (name, *pronouns)
    for names, pronouns in (
        ("Anna Maria Clara Julia Sofia Emma Alice Helen Nora Laura", ("she", "her")),
        ("Peter Thomas Henry Martin David Robert Samuel Walter Simon Victor", ("he", "his")),
    )
    for name in names.split()
)
_TOWNS = (
    "Ashford",
    "Milton",
    "Brookfield",
    "Weston",
    "Kingsley",
    "Norwood",
    "Elmstead",
    "Larkhill",
)

# Openings, middles and endings of each kind of text.
_GENRES: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "{hero} lived near the {place} with {own} family.",
            "{when}, {hero} went to the {place} to buy a {thing}.",
            "{hero} was a {who} who worked at the {place}.",
            "There was once a {who} called {hero}.",
            "{when}, {hero} found a {quality} {thing} behind the {place}.",
            "{hero} had waited {many} days for the {weather} to end.",
            "This is the story of {hero}, who wanted to {task}.",
        ),
        (
            "{when}, {he} walked {how} to the {place}.",
            "{He} put the {thing} on the table and sat down.",
            "The {who} asked {hero} about the {quality} {thing}.",
            "{He} felt {feeling}, but {he} said nothing.",
            "The {weather} made everyone in the {place} {feeling}.",
            "{hero} carried a {thing} and a {thing} in {own} bag.",
            "The {who} and the {who} talked {how} about the {weather}.",
            "{He} opened the door of the {place} and looked inside.",
            "It was a {quality} {thing}, and {he} liked it very much.",
            "{hero} counted {many} people in front of the {place}.",
            "The {who} smiled and gave {hero} a {thing}.",
            "Nobody knew why the {who} had left the {place} so early.",
            "{He} wrote a short note to the {who} and went home.",
            "In the {place} there were {many} chairs and a {quality} table.",
            "{hero} looked for {own} {thing}, but it was gone.",
            "A {who} came in from the {weather} and asked for a {thing}.",
            "{He} remembered the {thing} that {own} mother had kept.",
            "The {who} sold {many} of them at the {place} that day.",
            "Then the {who} told a story about a {quality} {thing}.",
            "{hero} laughed {how}, and the {who} laughed too.",
            "{He} had never seen such a {quality} {thing} before.",
            "The road to the {place} was long, and the {weather} did not stop.",
            "{He} thought about the {place} and felt {feeling}.",
            "The {who} worked {how} until the {place} closed.",
            "If the {weather} stays, said the {who}, we will all be {feeling}.",
            "{hero} bought some {food} and shared it with the {who}.",
            "The {thing} belonged to a {who} from {town}.",
            "{He} washed the {thing} and put it near the window.",
            "Outside, the {weather} moved {how} over the {place}.",
            "The {who} was {feeling} because the {thing} was {quality}.",
            "{hero} and the {who} cleaned the {place} {how}.",
            "{He} read the newspaper twice and kept it in {own} pocket.",
            "There was nothing in the {place} but a {quality} {thing}.",
            "The {who} promised to bring the {thing} back in {many} days.",
            "{He} learned to {task} from the {who}.",
            "They ate {food} and {food}, and then they began to {task}.",
            "You should not {task} here, said the {who}, but {hero} only smiled.",
            "{hero} asked the {who} for help with the {thing}.",
        ),
        (
            "At last {hero} went home and slept well.",
            "In the end the {who} was {feeling}, and so was {hero}.",
            "From that day on, {hero} visited the {place} every week.",
            "That was the last time {hero} saw the {quality} {thing}.",
            "{hero} never forgot the {who} and the {quality} {thing}.",
        ),
    ),
    (
        (
            "{town} is a {quality} town near the sea.",
            "The town of {town} has {many} streets and a {quality} {place}.",
            "People come to {town} from far away to see the {place}.",
        ),
        (
            "The {place} of {town} opens at {many} and closes late.",
            "Most people there {task} in the evening and rest on Sunday.",
            "There is a {place} next to the {place}, and both are {quality}.",
            "The {who} of the town is known for {quality} {food}.",
            "When the {weather} comes, the streets are empty.",
            "Every {who} in {town} owns a {thing} and a {quality} {thing}.",
            "It takes {many} minutes to walk from the {place} to the {place}.",
            "Long ago there was only a {place} and a few houses.",
            "Visitors can buy a {thing} or some {food} at the {place}.",
            "The children of {town} learn to {task} at school.",
            "Its oldest house belongs to the {who}, who is often {feeling}.",
            "In winter the {place} is closed because of the {weather}.",
            "The {food} is {quality}, and the people are {feeling}.",
            "Once a year the {who} and the {who} {task} in front of the {place}.",
        ),
        (
            "Whoever has seen {town} once will come back.",
            "That is why people like to live in {town}.",
        ),
    ),
    (
        (
            "To repair a {thing}, you need {many} hours and a {quality} {thing}.",
            "A good {who} knows how to make {food}.",
            "It is not hard to learn to {task}.",
        ),
        (
            "First, put the {thing} on a {quality} table.",
            "Then wait {many} minutes until it is {quality}.",
            "Ask a {who} if you do not have a {thing}.",
            "Do not use a {quality} {thing}, because it may break.",
            "Some people prefer a {quality} {thing}, but that is not needed.",
            "Clean the {thing} {how} and keep it away from the {weather}.",
            "You can find a {thing} at the {place} for {many} coins.",
            "If you feel {feeling}, rest and eat some {food}.",
            "Work {how}, and count to {many} before you begin.",
            "Add the {food} and stir {how}.",
        ),
        (
            "After {many} days you will be able to do it without help.",
            "That is all a {who} has to know.",
        ),
    ),
)


class Story(dict[str, str]):
    """Fills the slots of templates; hero and town are fixed, all else is drawn at each use."""

    def __init__(self, rng: random.Random) -> None:
        name, he, own = rng.choice(_HEROES)
        town = rng.choice(_TOWNS)
        super().__init__(hero=name, he=he, He=he.capitalize(), own=own, town=town)
        self._rng = rng

    def __missing__(self, slot: str) -> str:
        return self._rng.choice(SLOTS[slot])


def story(rng: random.Random, n_sentences: int, order: float = 0.0) -> Iterator[str]:
    """Sentences of one text, with an opening, middles that do not repeat soon, and an ending.

    `order` is the chance that a middle is the one after the last in the templates' order, and that
    the ending comes after the last of them: with it, even greedy decoding moves on and ends.
    """
    slots = Story(rng)
    openings, middles, endings = rng.choices(_GENRES, (3, 1, 1))[0]
    recent: list[str] = []
    for at in range(n_sentences):
        is_last = at == n_sentences - 1
        if at == 0:
            template = rng.choice(openings)
        elif is_last:
            template = rng.choice(endings)
        elif order and recent and rng.random() < order:
            following = middles.index(recent[-1]) + 1
            is_last = following == len(middles)
            template = rng.choice(endings) if is_last else middles[following]
        else:
            template = rng.choice([t for t in middles if t not in recent])
        recent = [*recent[-7:], template] if template in middles else recent
        yield re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", template.format_map(slots))
        if is_last:
            return


def prose(rng: random.Random) -> Iterator[str]:
    """Sentences of stories, without end."""
    while True:
        yield from story(rng, rng.randint(5, 14))
