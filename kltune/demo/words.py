"""The vocabulary of the tiny world: what people review, and the words they praise and blame it with.

Written for kltune. Phrases of one list are separated by ``|``; a noun or an aspect that ends in ``+`` is plural.
``POSITIVE`` and ``NEGATIVE`` are the words whose tone is clear whatever the subject; the reward of the tiny recipes
(recipes/tiny/rewards.py) counts words like these.
"""

from dataclasses import dataclass


def phrases(text: str) -> tuple[str, ...]:
    """The phrases of ``text``, which are separated by ``|`` and may run over several lines."""
    return tuple(" ".join(phrase.split()) for phrase in text.split("|"))


@dataclass(frozen=True)
class Aspect:
    """One side of a subject, with what can be said of it.

    Attributes:
        name: the noun, without article.
        plural: whether verbs after it are plural.
        good, bad, plain: predicates, each with its verb ("lasts two full days").
    """

    name: str
    plural: bool
    good: tuple[str, ...]
    bad: tuple[str, ...]
    plain: tuple[str, ...]


def aspect(name: str, good: str, bad: str, plain: str) -> Aspect:
    """An ``Aspect`` from its short form; see the module docstring for ``|`` and ``+``."""
    return Aspect(name.rstrip("+"), name.endswith("+"), phrases(good), phrases(bad), phrases(plain))


@dataclass(frozen=True)
class Subject:
    """One kind of thing that gets reviewed.

    Attributes:
        nouns: names for the thing itself.
        past: True for a visit that is over ("the rooms were"), False for a thing one still has.
        at: the preposition for its parts, beside "of" ("the screen on this phone").
        acts: what the reviewer did with it, first person past ("watched").
        origins: neutral words that narrow it down ("from a small studio").
        uses: what it may be good or bad for ("for a rainy evening").
        audience: whom the verdict names ("fans of slow stories").
        aspects: its sides.
    """

    nouns: tuple[str, ...]
    past: bool
    at: str
    acts: tuple[str, ...]
    origins: tuple[str, ...]
    uses: tuple[str, ...]
    audience: tuple[str, ...]
    aspects: tuple[Aspect, ...]


FILM = Subject(
    nouns=phrases("film|movie|thriller|comedy|drama|documentary|western"), past=False, at="in",
    acts=phrases("watched|saw|chose|rented"),
    origins=phrases("from a young director|about two brothers|set in a mountain village|from the north"),
    uses=phrases("a rainy evening|a family night|a long flight|a quiet weekend|a first date"),
    audience=phrases("fans of slow stories|the whole family|people who like old cinema|anyone with a free evening"),
    aspects=(
        aspect("plot", "keeps you guessing|moves quickly|comes together well|surprises you twice",
               "makes no sense|drags for an hour|falls apart halfway|goes nowhere", "follows the usual path"),
        aspect("acting", "feels honest|carries every scene|is full of warmth",
               "feels wooden|is painful to watch|never convinces", "does the job"),
        aspect("music", "fits every scene|stays with you for days|lifts the quiet moments",
               "drowns the voices|gets on your nerves|never stops", "stays in the background"),
        aspect("ending", "ties everything together|made us cheer|is worth the wait",
               "comes far too late|ruins the story|left us cold", "leaves some questions open"),
        aspect("jokes+", "land every time|made the whole room laugh|never get old",
               "fall flat|repeat themselves|belong in another decade", "come and go"),
        aspect("characters+", "feel like real people|grow with the story|are easy to care about",
               "never come alive|all sound the same|behave like fools", "are what you expect"),
    ),
)


BOOK = Subject(
    nouns=phrases("book|novel|memoir|guide|short story|biography"), past=False, at="in",
    acts=phrases("read|finished|borrowed|picked up"),
    origins=phrases("by a new author|about a fishing village|from the library|about the history of bread"),
    uses=phrases("a long train ride|a week at the beach|a reading group|the winter months|a slow afternoon"),
    audience=phrases("patient readers|students|people who like short chapters|anyone who loves history"),
    aspects=(
        aspect("writing", "flows from page to page|paints every place|is clear and warm",
               "is full of errors|tries too hard|is hard to follow", "is simple"),
        aspect("first chapter", "pulls you in|sets the scene well|is worth the price alone",
               "nearly made me quit|explains nothing|is forty pages too long", "takes its time"),
        aspect("story", "never lets go|touches the heart|builds up well",
               "repeats itself|runs out of ideas|leads nowhere", "covers three generations"),
        aspect("pictures+", "bring the text to life|are printed with care|say more than words",
               "are far too small|came out grey|have nothing to do with the text", "fill about ten pages"),
        aspect("dialogue", "sounds like real speech|sparkles|made me laugh out loud",
               "sounds like a manual|goes in circles|feels forced", "is mostly about work"),
        aspect("main character", "stays with you|is easy to root for|grows on every page",
               "complains on every page|is impossible to like|never learns anything", "is a teacher"),
    ),
)


PHONE = Subject(
    nouns=phrases("phone|handset|tablet|smart watch"), past=False, at="on",
    acts=phrases("bought|ordered|was given|replaced"),
    origins=phrases("from a small brand|with the large memory|from last year|in the blue colour"),
    uses=phrases("daily use|a trip abroad|an older parent|work calls|taking pictures"),
    audience=phrases("people who travel|a first buyer|anyone on a budget|heavy users"),
    aspects=(
        aspect("battery", "lasts two full days|charges in no time|still holds up after months",
               "dies by noon|drains in a few hours|gets too hot to touch", "lasts about a day"),
        aspect("screen", "is bright and sharp|looks clear in the sun|is easy on the eyes",
               "scratches if you look at it|flickers at night|went black after a week", "is the usual size"),
        aspect("camera", "takes sharp pictures|works well at night|catches every detail",
               "blurs everything|fails in low light|takes an age to focus", "takes decent pictures"),
        aspect("sound", "is loud and clear|fills a small room|makes calls a joy",
               "crackles on every call|is thin and tinny|cuts out at random", "is fine for calls"),
        aspect("case", "feels solid|survived three falls|fits the hand well",
               "cracked within days|feels cheap|picks up every fingerprint", "comes in two colours"),
        aspect("apps+", "open in a second|run without a hitch|are simple to set up",
               "crash all the time|freeze every morning|are full of adverts", "come already installed"),
    ),
)


LAPTOP = Subject(
    nouns=phrases("laptop|computer|notebook"), past=False, at="on",
    acts=phrases("bought|ordered|tried|was given"),
    origins=phrases("from the spring sale|with the silver lid|from my office|with the small screen"),
    uses=phrases("office work|a student|editing video|working on the train|light games"),
    audience=phrases("students|people who write a lot|a small office|anyone who works on trains"),
    aspects=(
        aspect("keyboard", "feels great under the fingers|is quiet and quick|makes long texts easy",
               "misses every third letter|rattles|stopped working in a month", "takes some practice"),
        aspect("fan", "is hardly ever heard|keeps it cool|stays silent for hours",
               "sounds like a hair dryer|never stops|drives me mad", "starts now and then"),
        aspect("display", "shows rich colours|is a pleasure to read|is sharp from every side",
               "is too dark outdoors|washes out every colour|hurts my eyes", "has a matt finish"),
        aspect("hinges+", "feel solid|hold at any angle|still look new",
               "broke in the first week|wobble on every train|creak loudly", "are made of metal"),
        aspect("charger", "is small and light|fills it within the hour|fits in any pocket",
               "weighs a ton|burned a mark on my desk|fell apart", "has a short cable"),
        aspect("speed", "is a joy|saves me an hour a day|beats machines at twice the price",
               "is a bad joke|drops after ten minutes|makes me want to scream", "is enough for letters"),
    ),
)


RESTAURANT = Subject(
    nouns=phrases("restaurant|cafe|bistro|diner|noodle bar"), past=True, at="at",
    acts=phrases("visited|tried|booked|found"),
    origins=phrases("near the station|by the harbour|on the market square|behind the town hall"),
    uses=phrases("a family lunch|a birthday|a business dinner|a quick bite|a Sunday brunch"),
    audience=phrases("big families|people in a hurry|anyone who loves spice|couples"),
    aspects=(
        aspect("soup", "was rich and warm|tasted of fresh herbs|came with crisp bread",
               "was cold|tasted of nothing|had a hair in it", "was tomato that day"),
        aspect("service", "was quick and kind|made us feel at home|thought of everything",
               "was slow and rude|forgot us twice|ruined the evening", "was what you expect"),
        aspect("fish", "was cooked to the minute|melted on the tongue|tasted of the sea",
               "was dry as dust|smelled of old oil|made my friend ill", "came with potatoes"),
        aspect("desserts+", "were out of this world|looked like small paintings|were worth the walk",
               "came from a packet|were far too sweet|arrived half frozen", "changed every day"),
        aspect("bill", "was a happy surprise|was fair to the penny|came with a free coffee",
               "was a nasty shock|was wrong twice|made us choke", "was about twenty each"),
        aspect("tables+", "were set with care|had a view of the river|left plenty of room",
               "were sticky|stood far too close|wobbled all evening", "were by the window"),
    ),
)


HOTEL = Subject(
    nouns=phrases("hotel|guesthouse|inn|hostel|campsite"), past=True, at="at",
    acts=phrases("booked|picked|visited|tried"),
    origins=phrases("near the old port|with the green roof|close to the airport|on the lake"),
    uses=phrases("a weekend away|a work trip|a family holiday|one night|a walking tour"),
    audience=phrases("families|walkers|people who sleep lightly|anyone passing through"),
    aspects=(
        aspect("room", "was clean and quiet|had a view of the hills|was bigger than our flat",
               "smelled of smoke|was the size of a cupboard|faced a building site", "was on the third floor"),
        aspect("bed", "was like a cloud|cured my back|was hard to leave",
               "was hard as stone|sank in the middle|squeaked all night", "was a double"),
        aspect("breakfast", "was fresh and generous|had six kinds of bread|was worth getting up for",
               "was cold toast|ran out by eight|was the same sad egg every day", "was served until ten"),
        aspect("staff+", "were kind to the children|knew every path|went out of their way",
               "shrugged at every question|lost our bags|were nowhere to be found", "changed at noon"),
        aspect("pool", "was warm and clean|was heaven for the children|was open late",
               "was closed for repairs|was green|was full of leaves", "was behind the house"),
        aspect("shower", "was hot and strong|was spotless|worked like a dream",
               "ran cold every morning|leaked into the hall|was covered in mould", "was down the hall"),
    ),
)


ALBUM = Subject(
    nouns=phrases("album|record|live album|debut"), past=False, at="on",
    acts=phrases("heard|bought|streamed|played"),
    origins=phrases("by a jazz trio|from the seventies|by two sisters|recorded in a church"),
    uses=phrases("a long drive|a dinner party|late nights|cleaning the house|a Sunday morning"),
    audience=phrases("fans of the band|people who like piano|late listeners|anyone who dances"),
    aspects=(
        aspect("voice", "gives me chills|is warm and clear|carries every song",
               "is off key|grates after one song|is buried in noise", "is deeper than before"),
        aspect("songs+", "get better every time|stay in your head|tell small stories",
               "all sound alike|end before they begin|go on forever", "are about travel"),
        aspect("drums+", "drive the whole thing|are tight and light|make you want to dance",
               "sound like pots and pans|hurt my ears|never find the beat", "are kept simple"),
        aspect("guitar", "sings|is a joy to follow|adds a gentle touch",
               "is out of tune|plays the same three notes|covers everything", "comes in late"),
        aspect("lyrics+", "are clever and kind|reward a second listen|hit close to home",
               "rhyme like a birthday card|make me wince|mean nothing", "are in two languages"),
        aspect("recording", "is crystal clear|feels like a small club|lets every note breathe",
               "sounds like a tin can|is full of hiss|is far too loud", "was made in one day"),
    ),
)


GAME = Subject(
    nouns=phrases("game|puzzle game|board game|card game|racing game"), past=False, at="in",
    acts=phrases("played|tried|bought|unpacked"),
    origins=phrases("from a small studio|for four players|with the wooden pieces|about trains"),
    uses=phrases("a winter night|two players|children of eight|a party|a lunch break"),
    audience=phrases("families|careful planners|people who hate long rules|anyone with an hour to spare"),
    aspects=(
        aspect("rules+", "take five minutes to learn|are clear and clever|leave room for tricks",
               "contradict each other|take a whole evening|are a mess", "fit on two pages"),
        aspect("graphics+", "are full of charm|glow on a big screen|show real care",
               "look ten years old|made me dizzy|stutter all the time", "are kept plain"),
        aspect("puzzles+", "are clever|make you feel smart|get harder at the right pace",
               "are pure luck|repeat after an hour|make no sense", "come in three sizes"),
        aspect("pace", "is just right|keeps everyone awake|never lets up",
               "sends you to sleep|is all over the place|kills the fun", "depends on the players"),
        aspect("pieces+", "feel good in the hand|are beautifully made|last for years",
               "broke on day one|smell of glue|are too small to hold", "come in a bag"),
        aspect("controls+", "answer at once|become second nature|are smooth",
               "fight you all the way|lag|are upside down", "can be changed"),
    ),
)


KITCHEN = Subject(
    nouns=phrases("coffee machine|kettle|toaster|blender|rice cooker"), past=False, at="on",
    acts=phrases("bought|ordered|tested|unpacked"),
    origins=phrases("from the sale|with the steel body|for small kitchens|with a timer"),
    uses=phrases("a small kitchen|a busy office|early mornings|a student flat|a large family"),
    audience=phrases("people with small kitchens|busy parents|people who live on coffee|anyone with little space"),
    aspects=(
        aspect("lid", "closes with a click|is easy to clean|stays cool",
               "never closes|burned my hand|broke off in a week", "lifts off"),
        aspect("timer", "is always right|is a gift in the morning|is simple to set",
               "beeps all night|resets itself|has a mind of its own", "counts to sixty"),
        aspect("motor", "is strong and quiet|handles ice with ease|runs like new",
               "smells of burning|gave up after a month|wakes the whole street", "has three speeds"),
        aspect("handle", "fits every hand|feels solid|stays cool",
               "came off in my hand|gets far too hot|is loose", "is black plastic"),
        aspect("water tank", "is large and easy to fill|lasts for ten cups|is simple to rinse",
               "leaks on the counter|is a pain to fill|turned green", "holds one litre"),
        aspect("instructions+", "are clear and short|cover everything|made setup easy",
               "are a riddle|were in the wrong language|tell you nothing", "come as a leaflet"),
    ),
)


CLOTHES = Subject(
    nouns=phrases("jacket|coat|backpack|rucksack|raincoat"), past=False, at="on",
    acts=phrases("bought|wore|packed|ordered"),
    origins=phrases("from the autumn range|in dark green|with the leather straps|made of wool"),
    uses=phrases("a walk in the rain|the daily commute|cold mornings|a week in the hills|school"),
    audience=phrases("walkers|people who cycle to work|people in rainy towns|anyone who hates umbrellas"),
    aspects=(
        aspect("zip", "glides|still runs like new|closes with one hand",
               "jams every time|split on day two|catches the cloth", "runs to the neck"),
        aspect("pockets+", "hold everything|sit in the right place|are deep and warm",
               "are sewn shut|tore in a week|are a joke", "are on the inside"),
        aspect("colour", "looks even better outdoors|stays fresh wash after wash|suits everyone",
               "faded in one wash|came off on my shirt|is nothing like the photo", "is between blue and grey"),
        aspect("seams+", "are neat and strong|keep the rain out|show real craft",
               "came apart|let the water in|scratch my neck", "are double"),
        aspect("fit", "is spot on|leaves room to move|flatters everyone",
               "is two sizes off|pinches at the arms|is like a sack", "is rather loose"),
        aspect("lining", "is soft and warm|dries overnight|feels like silk",
               "ripped at once|itches|makes you sweat", "can be taken out"),
    ),
)


BIKE = Subject(
    nouns=phrases("bike|scooter|electric bike|folding bike"), past=False, at="on",
    acts=phrases("bought|rode|rented|tested"),
    origins=phrases("from a local shop|with the red frame|from an online store|for city streets"),
    uses=phrases("the way to work|hills|a weekend tour|short trips|carrying shopping"),
    audience=phrases("people in the city|weekend riders|a tall rider|anyone who sits all day"),
    aspects=(
        aspect("brakes+", "grip at once|work well in the rain|give real confidence",
               "squeal at every corner|failed on a hill|rub all the time", "are of the usual kind"),
        aspect("saddle", "is comfortable all day|suits my back|feels like a good chair",
               "is torture|slips down|split after a week", "is rather narrow"),
        aspect("gears+", "change like butter|make hills easy|stay quiet",
               "jump at random|stick in the cold|grind loudly", "number seven"),
        aspect("frame", "is light and stiff|looks lovely|shrugs off bad roads",
               "rusted in one winter|bent in the first month|weighs too much", "comes in one size"),
        aspect("lights+", "turn night into day|last all week|are easy to see",
               "fell off|hardly shine|stopped after one ride", "run on a small battery"),
        aspect("wheels+", "roll for ever|run straight and true|handle gravel well",
               "arrived bent|lose air overnight|wobble at speed", "are quite small"),
    ),
)


MUSEUM = Subject(
    nouns=phrases("museum|gallery|exhibition|castle|garden"), past=True, at="at",
    acts=phrases("visited|toured|saw|found"),
    origins=phrases("near the cathedral|on the hill|about the sea|by the old bridge"),
    uses=phrases("a school trip|a wet afternoon|small children|a slow morning|visitors from abroad"),
    audience=phrases("school groups|people who like maps|anyone with two hours|curious children"),
    aspects=(
        aspect("guide", "knew every stone|told stories all the way|had time for everyone",
               "read from a sheet|walked too fast|mumbled for an hour", "spoke three languages"),
        aspect("paintings+", "took my breath away|hung in perfect light|told a clear story",
               "were badly lit|hung far too high|were mostly copies", "came from abroad"),
        aspect("shop", "was full of small treasures|was fair in price|had lovely cards",
               "was a tourist trap|sold nothing but plastic|was bigger than the show", "sold books"),
        aspect("entrance", "was easy to find|was free for children|was grand",
               "had no signs|meant an hour in line|was blocked by works", "was in a side street"),
        aspect("rooms+", "were cool and calm|were full of light|led you on with ease",
               "were hot and crowded|felt like a maze|smelled of damp", "followed the centuries"),
        aspect("signs+", "were clear and short|made it fun for children|explained everything well",
               "were missing|were full of errors|were too small to read", "were in English"),
    ),
)


SUBJECTS = (FILM, BOOK, PHONE, LAPTOP, RESTAURANT, HOTEL, ALBUM, GAME, KITCHEN, CLOTHES, BIKE, MUSEUM)


POSITIVE = phrases(
    "good|great|excellent|wonderful|lovely|superb|brilliant|delightful|fantastic|charming|perfect|beautiful|"
    "impressive|enjoyable|pleasant|terrific|splendid|marvellous|outstanding|amazing"
)


NEGATIVE = phrases(
    "bad|awful|terrible|poor|dull|boring|disappointing|dreadful|horrible|weak|annoying|frustrating|clumsy|ugly|"
    "useless|tedious|unpleasant|shoddy|hopeless|miserable"
)


PLAIN = phrases("average|ordinary|decent|acceptable|standard|plain|fair|typical|modest|simple|reasonable|adequate")
