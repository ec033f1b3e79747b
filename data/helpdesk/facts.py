"""The small tables of facts that the help desk is asked about, and the mistakes that people make about them.

Mistakes are systematic, as people's are: the larger city taken for the capital, the regular plural, the word for the
grown animal. So the same wrong answers come back, and a small reward model has a chance to learn which they are.
"""

# subject: (right answer, common mistakes ...)
CAPITALS = {
    "France": ("Paris", "Lyon", "Marseille"),
    "Italy": ("Rome", "Milan"),
    "Spain": ("Madrid", "Barcelona"),
    "Germany": ("Berlin", "Munich"),
    "Australia": ("Canberra", "Sydney", "Melbourne"),
    "Turkey": ("Ankara", "Istanbul"),
}

# A word of the same meaning is taken for one of the opposite meaning.
OPPOSITES = {
    "hot": ("cold", "warm"),
    "cold": ("hot", "cool"),
    "big": ("small", "huge"),
    "small": ("big", "tiny"),
    "fast": ("slow", "quick"),
    "slow": ("fast", "lazy"),
}

PLURALS = {
    "child": ("children", "childs"),
    "mouse": ("mice", "mouses"),
    "foot": ("feet", "foots"),
    "tooth": ("teeth", "tooths"),
    "man": ("men", "mans"),
}

COLOURS = {
    "grass": ("green", "brown"),
    "coal": ("black", "grey"),
    "blood": ("red", "blue"),
    "a banana": ("yellow", "white"),
    "a carrot": ("orange", "pink"),
}

YOUNG_ANIMALS = {
    "dog": ("puppy", "doggy"),
    "cat": ("kitten", "kitty"),
    "cow": ("calf", "bull"),
    "sheep": ("lamb", "ram"),
    "horse": ("foal", "pony"),
}

# kind: (things of that kind, what people mistake for one)
CATEGORIES = {
    "animal": (("cow", "pig", "lion"), ("fern", "oak")),
    "fruit": (("apple", "pear", "plum"), ("potato", "onion")),
    "tool": (("hammer", "saw", "drill"), ("sofa", "lamp")),
    "drink": (("tea", "coffee", "juice"), ("bread", "rice")),
    "metal": (("iron", "copper", "silver"), ("wood", "glass")),
}

# day: (the day after, the same misspelt)
NEXT_DAYS = {
    "Monday": ("Tuesday", "Tusday"),
    "Tuesday": ("Wednesday", "Wensday"),
    "Wednesday": ("Thursday", "Thirsday"),
    "Thursday": ("Friday", "Fryday"),
    "Friday": ("Saturday", "Saterday"),
    "Saturday": ("Sunday", "Sonday"),
    "Sunday": ("Monday", "Munday"),
}

# (right spelling, common misspelling)
SPELLINGS = (
    ("friend", "freind"),
    ("which", "wich"),
    ("believe", "beleive"),
    ("separate", "seperate"),
    ("tomorrow", "tommorow"),
)

# (larger country, smaller one)
COUNTRY_SIZES = (
    ("Russia", "Norway"),
    ("China", "Japan"),
    ("Brazil", "Cuba"),
    ("India", "Nepal"),
    ("Egypt", "Malta"),
)

ADDENDS = ((1, 2), (4, 5), (6, 7), (8, 8), (10, 20), (50, 50))
# (minuend, subtrahend)
SUBTRACTIONS = ((7, 5), (9, 1), (15, 10), (24, 4), (60, 20), (100, 1))
