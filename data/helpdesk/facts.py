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
    "China": "Beijing",
    "Greece": "Athens",
    "Poland": "Warsaw",
    "Austria": "Vienna",
    "Norway": "Oslo",
    "Ireland": "Dublin",
    "Portugal": "Lisbon",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Kenya": "Nairobi",
}

_OPPOSITE_PAIRS = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("tall", "short"),
    ("wet", "dry"),
    ("light", "dark"),
    ("full", "empty"),
    ("hard", "soft"),
    ("loud", "quiet"),
    ("rich", "poor"),
    ("strong", "weak"),
    ("early", "late"),
    ("thick", "thin"),
    ("clean", "dirty"),
    ("near", "far"),
    ("high", "low"),
)
OPPOSITES = {**dict(_OPPOSITE_PAIRS), **{second: first for first, second in _OPPOSITE_PAIRS}}

PLURALS = {
    "child": "children",
    "mouse": "mice",
    "foot": "feet",
    "tooth": "teeth",
    "man": "men",
    "woman": "women",
    "goose": "geese",
    "leaf": "leaves",
    "knife": "knives",
    "wolf": "wolves",
    "box": "boxes",
    "city": "cities",
    "baby": "babies",
    "cat": "cats",
    "dog": "dogs",
    "tree": "trees",
    "house": "houses",
    "potato": "potatoes",
}

COLOURS = {
    "grass": "green",
    "snow": "white",
    "milk": "white",
    "coal": "black",
    "blood": "red",
    "chocolate": "brown",
    "a banana": "yellow",
    "a lemon": "yellow",
    "a tomato": "red",
    "a carrot": "orange",
    "a pumpkin": "orange",
    "a frog": "green",
    "a raven": "black",
    "a flamingo": "pink",
    "the sea": "blue",
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
    "lion": "cub",
    "frog": "tadpole",
    "hen": "chick",
    "goose": "gosling",
}

SPELLING_WORDS = (
    "sun", "cup", "bed", "fox", "hat", "jam", "key", "map", "pen", "rug", "van", "zoo",
    "bird", "cake", "desk", "fish", "gold", "hand", "lamp", "moon", "nest", "road", "ship", "wind",
)  # fmt: skip

CATEGORIES = {
    "animal": ("cow", "pig", "lion", "rabbit", "bear"),
    "fruit": ("apple", "pear", "plum", "cherry", "melon"),
    "tool": ("hammer", "saw", "drill", "shovel", "rake"),
    "drink": ("tea", "coffee", "juice", "water", "cocoa"),
}

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
