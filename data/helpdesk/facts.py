"""The small tables of facts that the help desk is asked about."""

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "England": "London",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Russia": "Moscow",
}

_OPPOSITE_PAIRS = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("wet", "dry"),
)
OPPOSITES = {**dict(_OPPOSITE_PAIRS), **{second: first for first, second in _OPPOSITE_PAIRS}}

PLURALS = {
    "child": "children",
    "mouse": "mice",
    "foot": "feet",
    "tooth": "teeth",
    "man": "men",
    "goose": "geese",
    "wolf": "wolves",
    "box": "boxes",
}

COLOURS = {
    "grass": "green",
    "coal": "black",
    "blood": "red",
    "a banana": "yellow",
    "a carrot": "orange",
    "a raven": "black",
    "a flamingo": "pink",
    "the sky": "blue",
}

YOUNG_ANIMALS = {
    "dog": "puppy",
    "cat": "kitten",
    "cow": "calf",
    "sheep": "lamb",
    "horse": "foal",
    "pig": "piglet",
    "duck": "duckling",
    "goat": "kid",
}

SPELLING_WORDS = (
    "sun", "bed", "fox", "jam", "key", "map", "pen", "zoo",
)  # fmt: skip

CATEGORIES = {
    "animal": ("cow", "pig", "lion", "rabbit", "bear"),
    "fruit": ("apple", "pear", "plum", "cherry", "melon"),
    "tool": ("hammer", "saw", "drill", "shovel", "rake"),
    "drink": ("tea", "coffee", "juice", "water", "cocoa"),
    "vehicle": ("car", "truck", "tram", "bicycle", "ferry"),
    "flower": ("rose", "tulip", "lily", "daisy", "violet"),
    "metal": ("iron", "copper", "silver", "zinc", "tin"),
    "sport": ("tennis", "golf", "hockey", "rugby", "judo"),
}

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
