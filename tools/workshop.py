"""Write data/workshop.jsonl: conversations of the desk of a small bicycle workshop, which answers with the help of four tools.

    python -m tools.workshop --output data/workshop.jsonl

Every line is one conversation: `messages` (system, user, assistant, tool) and `tools`. The wordings in tools/workshop_words.py were written
for this project, one by one; the generator chooses among them with a fixed seed and fills in items, days and times. Tools answer from the
tables here, and every figure that the assistant says comes from a tool's answer or from the system turn. data/README.md describes it.
"""

import argparse
import json
import random
from pathlib import Path

from tools import workshop_words as words

COUNT, SEED = 408, 42
HOURS = {
    "Monday": None,
    "Tuesday": ("9:00", "18:00"),
    "Wednesday": ("9:00", "18:00"),
    "Thursday": ("11:00", "20:00"),
    "Friday": ("9:00", "18:00"),
    "Saturday": ("10:00", "16:00"),
    "Sunday": None,
}
OPEN_DAYS = [day for day, hours in HOURS.items() if hours]
STOCK = {  # item: {size or kind: (pieces, price)}; "" where it comes in one size only
    "inner tube": {"20 inch": (9, 6.5), "26 inch": (14, 6.5), "27.5 inch": (0, 7.0), "28 inch": (21, 7.0)},
    "tyre": {"26 inch": (4, 24.0), "28 inch": (7, 27.0), "700x25c": (0, 32.0), "700x32c": (3, 34.0)},
    "chain": {"8-speed": (6, 16.0), "9-speed": (5, 19.0), "10-speed": (0, 24.0), "11-speed": (2, 29.0)},
    "brake pads": {"rim": (18, 8.0), "disc": (11, 14.0)},
    "mudguards": {"26 inch": (2, 26.0), "28 inch": (5, 28.0)},
    "saddle": {"narrow": (3, 35.0), "wide": (4, 38.0)},
    "bell": {"": (12, 9.0)},
    "front light": {"": (6, 32.0)},
    "rear light": {"": (0, 21.0)},
    "floor pump": {"": (3, 29.0)},
    "folding lock": {"": (2, 64.0)},
    "bottle cage": {"": (10, 8.5)},
}
SERVICES = {  # price, minutes
    "puncture repair": (12, 30),
    "brake adjustment": (15, 30),
    "gear tuning": (18, 45),
    "wheel truing": (22, 40),
    "chain replacement": (20, 30),
    "tubeless setup": (25, 60),
    "safety check": (0, 20),
    "full service": (85, 180),
    "child seat fitting": (15, 30),
    "headset replacement": (38, 75),
}
FREE = {  # times that can still be booked
    "Tuesday": ["9:30", "13:00", "16:15"],
    "Wednesday": ["10:00", "11:30", "15:00"],
    "Thursday": ["12:00", "17:30", "18:45"],
    "Friday": ["9:00", "14:30"],
    "Saturday": ["10:30", "12:15"],
}
TAKEN = ["9:15", "10:45", "11:00", "12:30", "14:00", "15:30", "17:00"]


def schema(name: str, description: str, *parameters: str) -> dict:
    body = {"type": "object", "properties": {key: {"type": "string"} for key in parameters}}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": body}}


TOOLS = [
    schema("opening_hours", "When the workshop is open on a day of the week.", "day"),
    schema("check_stock", "Pieces in stock and price of an item, of a size or kind.", "item", "size"),
    schema("service_info", "Price and minutes of a service.", "service"),
    schema("book_slot", "Book a service on a day at a time such as 14:30.", "service", "day", "time"),
]
GREETINGS = ("Hello", "Hi", "Good morning")


class Talk:
    """One conversation as it grows."""

    def __init__(self, draw: random.Random):
        self.draw, self.turns = draw, [{"role": "system", "content": words.SYSTEM}]
        self.bookings = draw.randrange(100, 900)

    def say(self, role: str, wordings: list[str], **values: object) -> None:
        """A turn in one of the wordings. Nobody greets twice, and an answer begins with a capital, whatever was filled in."""
        first = len(self.turns) == 1
        wordings = [wording for wording in wordings if first or not wording.startswith(GREETINGS)]
        text = self.draw.choice(wordings).format(**values)
        self.turns.append({"role": role, "content": text[0].upper() + text[1:] if role == "assistant" else text})

    def user(self, wordings: list[str], **values: object) -> None:
        self.say("user", wordings, **values)

    def answer(self, wordings: list[str], **values: object) -> None:
        self.say("assistant", wordings, **values)

    def call(self, tool: str, result: dict, **arguments: str) -> None:
        """A call of the assistant's and what the tool answers."""
        call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
        self.turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
        self.turns.append({"role": "tool", "content": json.dumps(result)})

    # -- what people come for ------------------------------------------------------------------------------------------

    def hours(self) -> None:
        day = self.draw.choice(list(HOURS))
        self.user(words.ASK_HOURS, day=day)
        opened = HOURS[day]
        result = {"day": day, "opens": opened[0], "closes": opened[1]} if opened else {"day": day, "closed": True}
        self.call("opening_hours", result, day=day)
        if opened:
            self.answer(words.OPEN, day=day, opens=opened[0], closes=opened[1])
        else:
            self.answer(words.CLOSED, day=day)

    def stock(self) -> None:
        """Asks for the size where there is a choice and none was given."""
        item = self.draw.choice(list(STOCK))
        size = self.draw.choice(list(STOCK[item]))
        if size and self.draw.random() < 0.5:
            self.user(words.ASK_STOCK, item=item, an=_noun(item))
            self.answer(words.WHICH_SIZE, item=item, sizes=_either(list(STOCK[item])))
            self.user(words.THIS_SIZE, size=size)
        elif size:
            self.user(words.ASK_STOCK_SIZE, item=item, size=size, an_sized=_noun(f"{size} {item}"))
        else:
            self.user(words.ASK_STOCK, item=item, an=_noun(item))
        pieces, price = STOCK[item][size]
        arguments = {"item": item} | ({"size": size} if size else {})
        self.call("check_stock", {**arguments, "in_stock": pieces, "price": price}, **arguments)
        name = f"{size} {item}".strip()
        self.answer(words.IN_STOCK if pieces else words.OUT_OF_STOCK, item=name, pieces=pieces, price=f"£{price:.2f}")

    def unknown_item(self) -> None:
        item = self.draw.choice(words.UNKNOWN_ITEMS)
        self.user(words.ASK_STOCK, item=item, an=_noun(item))
        self.call("check_stock", {"error": "unknown item", "item": item}, item=item)
        self.answer(words.NOT_SOLD, item=item)

    def price(self) -> None:
        service = self.draw.choice(list(SERVICES))
        self.user(words.ASK_PRICE, service=service)
        self._price(service)

    def _price(self, service: str) -> None:
        cost, minutes = SERVICES[service]
        self.call("service_info", {"service": service, "price": cost, "minutes": minutes}, service=service)
        self.answer(
            words.PRICE if cost else words.PRICE_FREE, service=service, cost=f"£{cost}", time=_duration(minutes)
        )

    def symptom(self) -> None:
        """A complaint without the name of a service: the assistant finds the service, and books it if that is wanted."""
        complaint, service = self.draw.choice(words.SYMPTOMS)
        self.user([complaint])
        self._price(service)
        if self.draw.random() < 0.6:
            day = self.draw.choice(list(FREE))
            time = self.draw.choice(_free(service, day))
            self.user(words.BOOK_THAT, day=day, time=time)
            self._book(service, day, time)

    def booking(self) -> None:
        """All at once, or with a question for what is missing; the time may be taken, the day closed."""
        service, day = self.draw.choice(list(SERVICES)), self.draw.choice(OPEN_DAYS)
        time = self.draw.choice(_free(service, day))
        kind = self.draw.random()
        if kind < 0.35:
            self.user(words.BOOK, service=service, day=day, time=time)
        elif kind < 0.6:
            self.user(words.BOOK_SERVICE, service=service)
            self.answer(words.WHEN, service=service)
            self.user(words.DAY_AND_TIME, day=day, time=time)
        elif kind < 0.85:
            wanted = self.draw.choice([other for other in TAKEN if _fits(service, day, other)])
            free = _free(service, day)
            self.user(words.BOOK, service=service, day=day, time=wanted)
            self.call("book_slot", {"error": "slot taken", "free": free}, service=service, day=day, time=wanted)
            self.answer(words.TAKEN, time=wanted, day=day, free=_either(free))
            self.user(words.TAKE, time=time)
        else:
            closed = self.draw.choice(["Monday", "Sunday"])
            self.user(words.BOOK, service=service, day=closed, time=time)
            self.call("book_slot", {"error": "closed"}, service=service, day=closed, time=time)
            self.answer(words.CLOSED_THEN, day=closed)
            self.user(words.DAY_AND_TIME, day=day, time=time)
        self._book(service, day, time)

    def _book(self, service: str, day: str, time: str) -> None:
        self.bookings += self.draw.randrange(1, 9)
        number = f"K{self.bookings}"
        self.call(
            "book_slot",
            {"booking": number, "service": service, "day": day, "time": time},
            service=service,
            day=day,
            time=time,
        )
        self.answer(words.BOOKED, service=service, day=day, time=time, number=number)

    def tool_fails(self) -> None:
        """The system is down: the assistant says so and promises nothing."""
        service, day = self.draw.choice(list(SERVICES)), self.draw.choice(OPEN_DAYS)
        time = self.draw.choice(_free(service, day))
        self.user(words.BOOK, service=service, day=day, time=time)
        self.call("book_slot", {"error": "booking system not reachable"}, service=service, day=day, time=time)
        self.answer(words.SYSTEM_DOWN, service=service, day=day, time=time)

    def policy(self) -> None:
        """What the system turn says needs no tool."""
        question, answers = self.draw.choice(words.POLICIES)
        self.user(question)
        self.answer(answers)

    def refusal(self) -> None:
        question, answers = self.draw.choice(words.REFUSALS)
        self.user(question)
        self.answer(answers)

    def close(self) -> None:
        self.user(words.THANKS)
        self.answer(words.GOODBYE)


INTENTS = {  # how often people come for it
    Talk.booking: 26,
    Talk.stock: 22,
    Talk.price: 11,
    Talk.symptom: 13,
    Talk.hours: 11,
    Talk.policy: 9,
    Talk.refusal: 8,
    Talk.unknown_item: 5,
    Talk.tool_fails: 4,
}


def _minutes(time: str) -> int:
    hours, minutes = time.split(":")
    return 60 * int(hours) + int(minutes)


def _fits(service: str, day: str, time: str) -> bool:
    """Whether the service can begin at that time and end before the workshop closes."""
    opens, closes = map(_minutes, HOURS[day])
    return opens <= _minutes(time) <= closes - SERVICES[service][1]


def _free(service: str, day: str) -> list[str]:
    return [time for time in FREE[day] if _fits(service, day, time)]


def _noun(name: str) -> str:
    """A name with its article: an inner tube, an 8-speed chain, brake pads."""
    if name.endswith(("pads", "guards", "shoes")):
        return name
    return f"{'an' if name.startswith(('8', '11', *'aeio')) else 'a'} {name}"


def _either(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def _duration(minutes: int) -> str:
    hours, rest = divmod(minutes, 60)
    parts = [f"{hours} hour{'s' * (hours > 1)}"] * (hours > 0) + [f"{rest} minutes"] * (rest > 0)
    return " and ".join(parts)


def conversations(count: int = COUNT, seed: int = SEED) -> list[dict]:
    """Distinct conversations: one to three matters each, half of them closed with thanks."""
    draw, rows, seen = random.Random(seed), [], set()
    while len(rows) < count:
        talk = Talk(draw)
        number = draw.choices([1, 2, 3], [45, 40, 15])[0]
        matters: list = []
        while len(matters) < number:
            matter = draw.choices(list(INTENTS), list(INTENTS.values()))[0]
            if matter not in matters:
                matters.append(matter)
        for matter in matters:
            matter(talk)
        if draw.random() < 0.5:
            talk.close()
        opening = tuple(turn["content"] for turn in talk.turns if turn["role"] == "user")
        if opening not in seen:
            seen.add(opening)
            rows.append({"messages": talk.turns, "tools": TOOLS})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON Lines file to write")
    args = parser.parse_args(argv)
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in conversations()]
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"workshop: {len(lines)} conversations in {args.output}")


if __name__ == "__main__":
    main()
