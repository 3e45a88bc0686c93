"""The words that tasks are about, in ten languages."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """One language's words."""

    language: str
    steps: str  # a heading above a reply in steps
    names: Sequence[str]
    cities: Sequence[str]
    goods: Sequence[str]  # things that can be bought, in the singular
    colors: Sequence[str]
    weekdays: Sequence[str]  # Monday first
    months: Sequence[str]  # January first
    numbers: Sequence[str]  # two to twelve
    fields: Sequence[str]  # the words for: name, city, color, age


def _words(language: str, steps: str, **lists: str) -> Words:
    """Words from texts in which white space parts them."""
    return Words(language, steps, **{field: text.split() for field, text in lists.items()})


_SURNAMES = (
    "Adams Baker Costa Duarte Evans Fischer Garcia Hansen Ivanov Jansen Keller Lopez Moreau Novak "
    "Olsen Pereira Quinn Rossi Silva Torres Urban Vega Weber Young Zeller Bianchi Dupont Lang"
)
SURNAMES = tuple(_SURNAMES.split())  # of all languages in the Latin script

_LANGUAGES = (
    _words(
        "en",
        "Steps",
        names="Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Liam Mary Nina Oscar "
        "Paul Rose Sam Tina Victor Wendy Adam Bella Carl Diana Eric Fiona George Helen Lucy",
        cities="London Paris Rome Oslo Madrid Berlin Vienna Dublin Boston Chicago Dallas Denver "
        "Sydney Tokyo Cairo Lima Athens Prague Lisbon Geneva Toronto Seattle Austin Phoenix",
        goods="tea milk rice bread lamp chair table pencil paper soap honey butter cheese apple "
        "lemon orange banana onion pepper salt sugar coffee juice water book clock mirror brush "
        "hammer ladder bucket basket bottle glass plate spoon knife blanket pillow carpet candle "
        "guitar piano camera radio phone watch jacket shirt boots gloves scarf ticket map key wood "
        "stone rope tent garlic",
        colors="red blue green black white yellow brown gray pink purple orange silver",
        weekdays="Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        months="January February March April May June July August September October November "
        "December",
        numbers="two three four five six seven eight nine ten eleven twelve",
        fields="name city color age",
    ),
    _words(
        "es",
        "Pasos",
        names="Ana Luis Marta Pablo Elena Jorge Sofía Diego Carmen Raúl",
        cities="Madrid Sevilla Valencia Bilbao Lima Bogotá Quito Toledo Granada Murcia",
        goods="pan leche arroz queso mesa silla libro lápiz jabón reloj espejo vaso plato cuchara "
        "guitarra naranja tomate aceite",
        colors="rojo azul verde negro blanco gris",
        weekdays="lunes martes miércoles jueves viernes sábado domingo",
        months="enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre "
        "diciembre",
        numbers="dos tres cuatro cinco seis siete ocho nueve diez once doce",
        fields="nombre ciudad color edad",
    ),
    _words(
        "de",
        "Schritte",
        names="Anna Lukas Marie Jonas Lena Felix Greta Otto Karin Peter",
        cities="Berlin Hamburg Bremen Dresden Leipzig Köln Bonn Kiel Graz Basel",
        goods="Brot Milch Reis Tee Tisch Stuhl Lampe Buch Uhr Spiegel Glas Teller Messer Kerze "
        "Zucker Honig Apfel Hammer",
        colors="rot blau schwarz gelb braun grau",
        weekdays="Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag",
        months="Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
        numbers="zwei drei vier fünf sechs sieben acht neun zehn elf zwölf",
        fields="name stadt farbe alter",
    ),
    _words(
        "fr",
        "Étapes",
        names="Alice Louis Claire Hugo Manon Pierre Julie Marc Sophie Paul",
        cities="Paris Lyon Lille Nantes Nice Bordeaux Toulouse Rennes Dijon Tours",
        goods="pain lait riz fromage table chaise livre lampe savon miroir verre couteau bougie "
        "sucre miel pomme orange beurre",
        colors="rouge bleu vert noir blanc jaune",
        weekdays="lundi mardi mercredi jeudi vendredi samedi dimanche",
        months="janvier février mars avril mai juin juillet août septembre octobre novembre "
        "décembre",
        numbers="deux trois quatre cinq six sept huit neuf dix onze douze",
        fields="nom ville couleur âge",
    ),
    _words(
        "it",
        "Passaggi",
        names="Luca Giulia Marco Paola Sara Pietro Chiara Franco Elisa Dario",
        cities="Roma Milano Napoli Torino Bari Genova Verona Pisa Siena Parma",
        goods="pane latte riso tavolo sedia libro lampada sapone bicchiere piatto coltello "
        "zucchero miele mela formaggio burro chitarra martello",
        colors="rosso blu verde nero bianco giallo",
        weekdays="lunedì martedì mercoledì giovedì venerdì sabato domenica",
        months="gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre "
        "novembre dicembre",
        numbers="due tre quattro cinque sei sette otto nove dieci undici dodici",
        fields="nome città colore età",
    ),
    _words(
        "pt",
        "Passos",
        names="João Maria Pedro Inês Tiago Rita Bruno Clara Nuno Vera",
        cities="Lisboa Braga Coimbra Faro Recife Natal Salvador Curitiba Santos Belém",
        goods="pão leite arroz queijo mesa cadeira livro vela copo prato garfo mel laranja tomate "
        "sal faca martelo viola",
        colors="verde preto branco amarelo azul cinza",
        weekdays="segunda-feira terça-feira quarta-feira quinta-feira sexta-feira sábado domingo",
        months="janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro "
        "dezembro",
        numbers="dois três quatro cinco seis sete oito nove dez onze doze",
        fields="nome cidade cor idade",
    ),
    _words(
        "nl",
        "Stappen",
        names="Jan Sanne Pieter Lotte Daan Eva Bram Femke Koen Tess",
        cities="Amsterdam Utrecht Leiden Delft Gent Breda Zwolle Arnhem Brugge Haarlem",
        goods="brood melk rijst kaas tafel stoel lamp boek klok spiegel glas vork mes suiker "
        "honing appel hamer deken",
        colors="rood blauw groen zwart wit geel",
        weekdays="maandag dinsdag woensdag donderdag vrijdag zaterdag zondag",
        months="januari februari maart april mei juni juli augustus september oktober november "
        "december",
        numbers="twee drie vier vijf zes zeven acht negen tien elf twaalf",
        fields="naam stad kleur leeftijd",
    ),
    _words(
        "pl",
        "Kroki",
        names="Anna Jan Ewa Piotr Zofia Adam Maria Tomasz Olga Marek",
        cities="Warszawa Gdynia Poznań Lublin Opole Radom Kielce Sopot Toruń Elbląg",
        goods="chleb mleko ryż ser lampa zegar lustro talerz miska cukier kawa herbata jabłko "
        "dywan gitara obraz rower piłka",
        colors="zielony czarny biały szary czerwony niebieski",
        weekdays="poniedziałek wtorek środa czwartek piątek sobota niedziela",
        months="styczeń luty marzec kwiecień maj czerwiec lipiec sierpień wrzesień październik "
        "listopad grudzień",
        numbers="dwa trzy cztery pięć sześć siedem osiem dziewięć dziesięć jedenaście dwanaście",
        fields="imię miasto kolor wiek",
    ),
    _words(
        "ru",
        "Шаги",
        names="Анна Иван Ольга Пётр Нина Олег",
        cities="Москва Самара Казань Омск Тула Сочи",
        goods="чай хлеб рис сыр стол лампа книга мёд соль нож",
        colors="синий белый чёрный",
        weekdays="понедельник вторник среда четверг пятница суббота воскресенье",
        months="январь февраль март апрель май июнь июль август сентябрь октябрь ноябрь декабрь",
        numbers="два три четыре пять шесть семь восемь девять десять одиннадцать двенадцать",
        fields="имя город цвет возраст",
    ),
    _words(
        "zh",
        "步骤",
        names="李明 王芳 张伟 刘洋 陈静 赵强",
        cities="北京 上海 广州 成都 西安 南京",
        goods="茶 米 水 书 灯 糖 盐 刀 碗 油",
        colors="红 白 黑 黄",
        weekdays="星期一 星期二 星期三 星期四 星期五 星期六 星期日",
        months="1月 2月 3月 4月 5月 6月 7月 8月 9月 10月 11月 12月",
        numbers="二 三 四 五 六 七 八 九 十 十一 十二",
        fields="姓名 城市 颜色 年龄",
    ),
)

WORDS = {words.language: words for words in _LANGUAGES}
