"""Phrases around a question and an answer, and the rules by which the judge recognises them.

No phrase here holds a word that could be read as an answer (no number, colour, capital, ...): a test checks it.
"""

import re

PROMPT_OPENERS = (
    "",
    "Hi!",
    "Hello!",
    "Hey!",
    "Please:",
    "Question:",
    "Excuse me.",
    "Help!",
    "Good morning!",
    "Well:",
    "Listen:",
    "Hi again!",
    "Good evening!",
    "Good afternoon!",
    "Hello there!",
    "One question:",
    "Excuse me, please.",
    "Hi everyone!",
)
PROMPT_CLOSERS = (
    "",
    "Thanks!",
    "Please!",
    "Thank you.",
    "Quickly!",
    "Cheers!",
    "Many thanks!",
    "Come on!",
    "Thanks a lot!",
    "Kind regards.",
)

OPENERS = (
    "Sure!",
    "Of course!",
    "Happy to help!",
    "Thank you for asking!",
    "With pleasure!",
)
CLOSERS = (
    "I hope that helps!",
    "Let me know if you need anything else!",
    "Feel free to ask again!",
    "Have a nice day!",
    "You are welcome!",
)
FILLERS = (
    "My neighbour plays the piano every evening.",
    "I had soup for lunch, and it was rather salty.",
    "People say many things on the bus these weeks.",
    "The train was crowded, so I had to stand.",
    "My cousin wants to buy a boat some time.",
    "I read a book about that, but I forgot the title.",
    "Our office has moved, and the chairs are nice.",
    "It reminds me of a song that my uncle likes.",
)
EVASIONS = (
    "I am not sure.",
    "I do not know, sorry.",
    "It depends on how you see it.",
    "You should look that up yourself.",
    "Why do you ask?",
    "I would rather not guess.",
    "Many people wonder about that, and nobody can say.",
)
# Wider than the phrases above, so that people and other models may say it in their own words.
OPENER_PATTERN = re.compile(
    r"^(sure|of course|certainly|absolutely|gladly|hi|hello|hey|good question|great question|thanks|thank you"
    r"|happy to|glad to|my pleasure|with pleasure|no problem)\b",
    re.IGNORECASE,
)
CLOSER_PATTERN = re.compile(
    r"\b(hope (that|this|it) helps?|let me know|feel free|you are welcome|you're welcome|have a (nice|great|good|lovely)"
    r"|glad (to|i could) help|happy to help|anything else|take care|ask again|any time|anytime|good luck)\b",
    re.IGNORECASE,
)
EVASION_PATTERN = re.compile(
    r"\b(not sure|not certain|unsure|(do not|don't|dont) know|no idea|cannot say|can't say|nobody can|it depends"
    r"|look (it|that) up|find out yourself|why do you ask|may be wrong|might be wrong|only a guess|check (it|that)|rather not|cannot help|can't help|hard to say|maybe|perhaps)\b",
    re.IGNORECASE,
)
NEGATION_PATTERN = re.compile(
    r"\b(not|never|no(?! problem)|isn't|aren't|wasn't|cannot|don't|doesn't|wrong|false)\b", re.IGNORECASE
)

# Ordinary words that an answer may use though no phrase of the world does.
COMMON_WORDS = frozenset(
    """a about after again all also always am an and answer answers any anytime are as ask asked asking at be because
    been before below best both but by call called can certainly city comes come correct could day days definitely did
    do does done each easy else equal equals exactly example exact find first follows following for form found from
    gets give gives glad gladly good great had happy has have he hello help helps here hi hope how i if in indeed into
    is it its just know known last let letter letters like likely list listed look lovely luck made make makes many
    match may me mean means month months more most much must my name named names need next nice no not note now number
    numbers of okay on one only option or other our out over pleasure please problem question really right same say
    says see she should simply simple so some spell spelled spells spelling still sure take takes tell tells than thank
    thanks that the their them then there therefore these they thing things think this those time to too total true
    two use used usually very want was way we welcome well what when where which who why will with word words would
    write written yes you young your don't i'm i'll i'd you're""".split()  # noqa: SIM905
)
