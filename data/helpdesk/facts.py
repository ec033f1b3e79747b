"""The small tables of facts that the help desk is asked about."""

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "England": "London",
}

_OPPOSITE_PAIRS = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
)
OPPOSITES = {**dict(_OPPOSITE_PAIRS), **{second: first for first, second in _OPPOSITE_PAIRS}}

PLURALS = {
    "child": "children",
    "mouse": "mice",
    "foot": "feet",
    "tooth": "teeth",
    "man": "men",
}

COLOURS = {
    "grass": "green",
    "coal": "black",
    "blood": "red",
    "a banana": "yellow",
    "a carrot": "orange",
}

YOUNG_ANIMALS = {
    "dog": "puppy",
    "cat": "kitten",
    "cow": "calf",
    "sheep": "lamb",
    "horse": "foal",
}

SPELLING_WORDS = (
    "sun", "bed", "fox", "jam", "key",
)  # fmt: skip

CATEGORIES = {
    "animal": ("cow", "pig", "lion"),
    "fruit": ("apple", "pear", "plum"),
    "tool": ("hammer", "saw", "drill"),
    "drink": ("tea", "coffee", "juice"),
    "metal": ("iron", "copper", "silver"),
}

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
