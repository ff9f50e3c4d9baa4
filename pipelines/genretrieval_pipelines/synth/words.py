"""The words of the demo shop: what it sells, which traits its products have, and what goes with what."""

from __future__ import annotations

from dataclasses import dataclass

ATTRIBUTE_KINDS = ("color", "material", "style", "audience")

# department > category, then one line a leaf:
#   noun | plural | another word for it | median price | styles | materials | sizes | palette | flags
# Flags: `c` it is used up and bought again, `a` it comes for women, men or everyone.
_LEAVES = """
fashion > shoes
running shoe|running shoes|trainers|84|cushioned,trail,lightweight|mesh,knit|38,40,42,44|color|a
ankle boot|ankle boots|short boots|110|chelsea,lace-up|leather,suede|37,39,41|color|a
electronics > phones
smartphone|smartphones|mobile phone|420|compact,dual camera|glass,aluminium|128 GB,256 GB|color|
phone case|phone cases|mobile cover|19|slim,rugged,wallet|silicone,leather,recycled plastic||color|
beauty > makeup
lipstick|lipsticks|lip colour|15|matte,satin,sheer||3 g,4 g|shade|c
mascara|mascaras|lash colour|17|volume,waterproof||8 ml,10 ml|shade|c
home > kitchen
chef knife|chef knives|kitchen knife|62|forged,serrated|steel,ceramic|16 cm,20 cm||
coffee mug|coffee mugs|cup|13|tall,stackable|stoneware,porcelain|250 ml,350 ml|color|
sport > fitness
yoga mat|yoga mats|exercise mat|39|non-slip,foldable|cork,natural rubber|4 mm,6 mm|color|
dumbbell|dumbbells|hand weight|34|hex,adjustable|cast iron,neoprene|4 kg,8 kg,12 kg|color|
grocery > hot drinks
ground coffee|ground coffees|filter coffee|9|dark roast,medium roast,decaf||250 g,500 g|sweet|c
green tea|green teas|loose leaf tea|7|organic,sencha,bagged||100 g,200 g|fruit|c
baby > nappies and care
diaper|diapers|nappies|24|sensitive,overnight|cotton,bamboo|size 2,size 3,size 4||c
baby wipes|baby wipes|wet wipes|6|sensitive,biodegradable|cotton,bamboo|60 count,120 count|scent|c
pets > dogs
dog food|dog foods|kibble|38|grain free,senior,puppy||2 kg,6 kg,12 kg|meat|c
dog leash|dog leashes|dog lead|22|retractable,hands-free|nylon,leather|1.5 m,3 m|color|
fashion > clothing
t-shirt|t-shirts|tee|24|crew neck,oversized,slim fit|cotton,linen|S,M,L|color|a
hoodie|hoodies|hooded sweatshirt|52|zip,pullover|cotton,fleece|S,M,L|color|a
rain jacket|rain jackets|waterproof coat|96|packable,insulated|nylon,recycled polyester|S,M,L|color|a
jeans|jeans|denim trousers|72|slim fit,straight,high rise|cotton,stretch denim|30,32,34|color|a
electronics > phone accessories
screen protector|screen protectors|display film|14|privacy,matte|glass,film|||
fast charger|fast chargers|power adapter|29|wall,car,wireless|recycled plastic,aluminium|20 W,45 W,65 W|color|
beauty > skincare
face cream|face creams|moisturizer|31|rich,oil free,night||50 ml,75 ml|scent|ca
face serum|face serums|face concentrate|38|vitamin c,hydrating,retinol||30 ml,50 ml|scent|c
sunscreen|sunscreens|sun lotion|21|mineral,sport,invisible||50 ml,150 ml|scent|c
cleansing gel|cleansing gels|face wash|16|gentle,purifying||150 ml,200 ml|scent|ca
home > cooking
frying pan|frying pans|skillet|48|deep,induction|cast iron,steel,ceramic|24 cm,28 cm||
coffee maker|coffee makers|coffee machine|120|drip,espresso,pour over|steel,glass|4 cups,10 cups|color|
sport > outdoor
tent|tents|camping shelter|210|dome,tunnel,ultralight|nylon,polycotton|2 person,4 person|color|
sleeping bag|sleeping bags|mummy bag|115|summer,winter|down,synthetic|regular,long|color|
hiking boot|hiking boots|trekking boots|135|mid,high|leather,mesh|38,40,42,44|color|a
headlamp|headlamps|head torch|44|rechargeable,compact|aluminium,recycled plastic|300 lm,600 lm|color|
grocery > snacks
dark chocolate|dark chocolates|chocolate bar|4|70 percent,85 percent,vegan||100 g,180 g|sweet|c
protein bar|protein bars|fitness bar|3|vegan,crunchy||45 g,60 g|sweet|c
granola|granolas|muesli|6|crunchy,low sugar,organic||400 g,750 g|sweet|c
roasted nuts|roasted nuts|nut mix|7|salted,unsalted||150 g,400 g|spice|c
baby > toys
plush toy|plush toys|soft toy|21|cuddly,musical|cotton,recycled polyester|20 cm,35 cm|color|
building blocks|building blocks|stacking bricks|33|magnetic,classic|wood,recycled plastic|40 pieces,100 pieces|color|
puzzle|puzzles|jigsaw|17|animal,map|wood,cardboard|24 pieces,100 pieces|color|
board game|board games|family game|28|cooperative,strategy|wood,cardboard|2 players,4 players||
pets > cats
cat food|cat foods|wet food|26|indoor,kitten,senior||1 kg,3 kg|meat|c
cat litter|cat litters|litter sand|15|clumping,low dust|clay,wood|5 l,10 l|scent|c
cat tree|cat trees|scratching post|74|wall mounted,tall|sisal,wood|90 cm,140 cm|color|
cat toy|cat toys|feather wand|9|interactive,catnip|felt,sisal||color|
fashion > accessories
backpack|backpacks|rucksack|68|rolltop,laptop,mini|nylon,canvas,leather|15 l,22 l|color|a
sunglasses|sunglasses|shades|57|polarized,round,aviator|acetate,metal||color|a
electronics > audio
wireless earbuds|wireless earbuds|in-ear headphones|92|noise cancelling,sport||single,dual pack|color|
headphones|headphones|headset|140|noise cancelling,over-ear,studio|leather,aluminium||color|
bluetooth speaker|bluetooth speakers|portable speaker|76|waterproof,mini|fabric,aluminium|10 W,20 W|color|
beauty > hair
shampoo|shampoos|hair wash|12|volume,repair,anti dandruff||250 ml,400 ml|scent|ca
conditioner|conditioners|hair rinse|13|repair,colour care||250 ml,400 ml|scent|c
hair oil|hair oils|hair treatment|22|argan,light||50 ml,100 ml|scent|c
home > bedroom
duvet cover|duvet covers|quilt cover|68|striped,plain|cotton,linen,satin|single,double,king|color|
pillow|pillows|cushion|36|side sleeper,cooling|memory foam,down|40 cm,80 cm||
throw blanket|throw blankets|plaid|45|chunky,fringed|wool,fleece,cotton|130 cm,180 cm|color|
sport > cycling
bike helmet|bike helmets|cycling helmet|79|urban,road,mountain||S,M,L|color|
bike light|bike lights|cycle lamp|27|front,rear|aluminium,recycled plastic|200 lm,500 lm|color|
water bottle|water bottles|drinking flask|24|insulated,squeeze|steel,recycled plastic|500 ml,750 ml|color|
grocery > pantry
olive oil|olive oils|extra virgin oil|14|organic,fruity,mild||500 ml,750 ml||c
pasta sauce|pasta sauces|tomato sauce|5|spicy,basil,organic||350 g,700 g||c
honey|honeys|raw honey|9|organic,creamy,forest||250 g,500 g|blossom|c
baby > feeding
baby bottle|baby bottles|feeding bottle|14|anti-colic,wide neck|glass,silicone|150 ml,250 ml|color|
baby lotion|baby lotions|baby cream|10|sensitive,calming||200 ml,400 ml|scent|c
baby food|baby foods|fruit puree|3|organic,vegetable||100 g,190 g|fruit|c
pets > pet care
dog treats|dog treats|dog snacks|8|dental,training,soft||150 g,400 g|meat|c
dog bed|dog beds|dog basket|64|orthopedic,washable|fleece,cotton|60 cm,90 cm|color|
pet shampoo|pet shampoos|fur wash|13|sensitive,shine||250 ml,500 ml|scent|c
electronics > computing
laptop|laptops|notebook computer|890|ultralight,gaming|aluminium,carbon|13 inch,15 inch|color|
computer mouse|computer mice|wireless mouse|36|ergonomic,silent|recycled plastic,aluminium||color|
laptop sleeve|laptop sleeves|notebook case|31|slim,padded|felt,leather,neoprene|13 inch,15 inch|color|
beauty > fragrance
eau de parfum|eaux de parfum|perfume|74|woody,floral,fresh||30 ml,50 ml|scent|ca
home > living
scented candle|scented candles|candle|23|travel,three wick|soy wax,beeswax|120 g,250 g|scent|c
table lamp|table lamps|desk lamp|59|dimmable,mushroom|brass,glass,wood|30 cm,45 cm|color|
wall clock|wall clocks|clock|42|silent,minimal|wood,metal|25 cm,35 cm|color|
fashion > basics
ankle socks|ankle socks|short socks|12|seamless,cushioned|cotton,wool,bamboo|36-40,41-45|color|ac
sport > running gear
running belt|running belts|waist pack|26|slim,reflective|neoprene,nylon|S,M,L|color|
running cap|running caps|sports hat|22|breathable,reflective|mesh,recycled polyester||color|a
resistance band|resistance bands|elastic band|16|loop,tube|latex,fabric|light,heavy|color|
grocery > cold drinks
sparkling water|sparkling waters|soda water|2|extra fizzy,mineral||500 ml,1 l|fruit|c
energy drink|energy drinks|sports drink|3|sugar free,isotonic||330 ml,500 ml|fruit|c
"""

_PALETTES = {
    "color": "black,white,navy,red,olive,beige,grey,pink,teal,mustard,burgundy,lilac",
    "shade": "ruby red,nude rose,coral,plum,berry brown,jet black",
    "scent": "lavender,vanilla,citrus,rose,sandalwood,sea salt,unscented",
    "sweet": "hazelnut,vanilla,caramel,original,almond,orange",
    "fruit": "lemon,wild berry,peach,ginger,mint,original",
    "spice": "smoked,chili,rosemary,sea salt,original",
    "blossom": "acacia,clover,linden,heather,lavender",
    "meat": "chicken,salmon,beef,turkey,lamb",
}
_AUDIENCES = ("women", "men", "unisex")

# Bought after: a person who took the left leaf is likelier to look at the right ones next.
_COMPLEMENTS = """
smartphone: phone case, screen protector, fast charger, wireless earbuds
phone case: screen protector, fast charger
laptop: laptop sleeve, computer mouse, backpack
laptop sleeve: computer mouse
headphones: bluetooth speaker
running shoe: ankle socks, running belt, running cap
running belt: water bottle, energy drink
jeans: t-shirt, ankle boot
t-shirt: hoodie, jeans
hoodie: rain jacket
ankle boot: ankle socks
backpack: water bottle, laptop sleeve
sunglasses: sunscreen
lipstick: mascara
mascara: cleansing gel
cleansing gel: face serum
face serum: face cream
face cream: sunscreen
shampoo: conditioner
conditioner: hair oil
eau de parfum: scented candle
chef knife: frying pan
frying pan: olive oil, pasta sauce
coffee maker: ground coffee, coffee mug
coffee mug: green tea, ground coffee
ground coffee: dark chocolate, coffee mug
green tea: honey
granola: honey
olive oil: pasta sauce
duvet cover: pillow, throw blanket
throw blanket: scented candle
table lamp: wall clock
yoga mat: resistance band, water bottle
dumbbell: protein bar, resistance band
resistance band: yoga mat
tent: sleeping bag, headlamp
sleeping bag: headlamp
hiking boot: ankle socks, backpack
bike helmet: bike light
bike light: water bottle
protein bar: energy drink
roasted nuts: sparkling water
diaper: baby wipes
baby wipes: baby lotion
baby bottle: baby food
baby food: diaper
plush toy: puzzle, building blocks
puzzle: board game
dog food: dog treats
dog leash: dog treats, dog bed
dog bed: pet shampoo
cat food: cat litter
cat tree: cat toy
cat litter: cat food
"""

_BRAND_STARTS = "Lum Vel Tav Nor Ael Brel Sol Mav Zeph Fen Osk Cald Dun Hal Iv Jor Kest Pel Quin Rav"
_BRAND_ENDS = "ora ique ano eth wyn issa ello mark den una"
_LINES = """
Nova Terra Classic Aria Pure Studio Atlas Echo Flora Prime Metro Alto Breeze Core Delta Ember Grove Halo
Isla Jade Lark Mira North Opal Pico Quest Ridge Sol Tempo Vista
"""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf category: what it is called and which traits its products may have.

    Attributes:
        department: first level of the taxonomy.
        category: second level.
        noun: third level, as it stands in a title.
        plural: as people type it.
        synonym: another word that people type and titles never carry.
        price: median price.
        choices: per kind of `ATTRIBUTE_KINDS` the values a product may have; empty where the kind does not apply.
        sizes: sizes a variant may have.
        consumable: it is used up, so that the same item is bought again.
    """

    department: str
    category: str
    noun: str
    plural: str
    synonym: str
    price: float
    choices: tuple[tuple[str, ...], ...]
    sizes: tuple[str, ...]
    consumable: bool


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _read_leaves() -> list[Leaf]:
    leaves, department, category = [], "", ""
    for line in _LEAVES.strip().splitlines():
        if " > " in line:
            department, category = line.split(" > ")
            continue
        noun, plural, synonym, price, styles, materials, sizes, palette, flags = line.split("|")
        colors = _words(_PALETTES[palette]) if palette else ()
        audiences = _AUDIENCES if "a" in flags else ()
        choices = (colors, _words(materials), _words(styles), audiences)
        leaves.append(
            Leaf(department, category, noun, plural, synonym, float(price), choices, _words(sizes), "c" in flags)
        )
    return leaves


def _read_complements() -> dict[str, tuple[str, ...]]:
    pairs = (line.split(": ") for line in _COMPLEMENTS.strip().splitlines())
    return {left: tuple(right.split(", ")) for left, right in pairs}


# Ordered so that the first n leaves cover all departments: a small shop takes a prefix.
LEAVES = _read_leaves()
COMPLEMENTS = _read_complements()
BRANDS = [start + end for end in _BRAND_ENDS.split() for start in _BRAND_STARTS.split()]
LINES = _LINES.split()
