"""The wordings of data/workshop.jsonl, written for it one by one. Braces are filled in by tools/workshop.py."""

SYSTEM = (
    "You are the desk assistant of Kettle Lane Bicycle Workshop. Hours, stock, prices and bookings come from the tools only. "
    "4 Kettle Lane, behind the market hall; cards and cash; repairs: 3 months' guarantee; bikes are kept for 30 days; "
    "no motorcycles, no e-bike motors or batteries. Be brief."
)

ASK_HOURS = [
    "When do you open on {day}?",
    "Are you open on {day}?",
    "What time do you close on {day}?",
    "opening hours {day}?",
    "Could I drop by on {day} after work, or will you be shut?",
    "I'd like to bring my bike in on {day}. What are your hours then?",
    "Hi, until when is somebody there on {day}?",
    "Is {day} one of your days?",
    "How early can I come on {day}?",
    "Good morning! Will the workshop be open this {day}?",
    "What are the hours for {day}, please?",
    "{day}: open or closed?",
    "My train gets in late on {day}. Will I still catch you?",
    "Can I collect my bike on {day}?",
]
OPEN = [
    "On {day} we are open from {opens} to {closes}.",
    "Yes, {day} is fine: we're here from {opens} until {closes}.",
    "{day}: {opens} to {closes}.",
    "We open at {opens} on {day} and close at {closes}.",
    "You can come on {day} between {opens} and {closes}.",
    "On {day} somebody is at the desk from {opens} to {closes}.",
]
CLOSED = [
    "Sorry, we are closed on {day}.",
    "We don't open on {day}, I'm afraid. Would another day suit you?",
    "{day} is one of our days off, sorry.",
    "I'm sorry, the workshop stays shut on {day}.",
    "Not on {day}: we are closed then.",
]

ASK_STOCK = [
    "Do you sell {an}?",
    "I need {an}. Have you got any?",
    "Hello, I'm looking for {an}.",
    "Is there {an} in stock?",
    "How much is {an} with you?",
    "Can I buy {an} at the desk?",
    "My old one broke. Do you have {an}?",
    "What would {an} cost me?",
    "Any chance you keep {an}?",
    "{item}: do you have that?",
    "I was told you might have {an}.",
    "Before I cycle over: do you stock {an}?",
]
WHICH_SIZE = [
    "Which do you need: {sizes}?",
    "Happy to look. Should it be {sizes}?",
    "We keep more than one kind. Is it {sizes}?",
    "Let me check: {sizes}?",
    "For {item} I need to know one thing first: {sizes}?",
    "Do you know which one fits your bike, {sizes}?",
]
THIS_SIZE = [
    "{size}.",
    "{size}, please.",
    "It says {size} on the old one.",
    "That would be {size}.",
    "I think {size}. Yes, {size}.",
    "{size}, I just looked.",
    "Mine takes {size}.",
]
ASK_STOCK_SIZE = [
    "Do you have {an_sized} in stock?",
    "I need {an_sized}.",
    "Have you got {an_sized}, and what does it come to?",
    "Hi! Looking for {an_sized} for my daily bike.",
    "Could you check whether there is {an_sized} left?",
    "How much for {an_sized}?",
    "{item}, {size}: in stock?",
    "I'd like to pick up {an_sized} today if you have that.",
    "Is {an_sized} something you keep?",
    "Do you carry {item} in {size}?",
]
IN_STOCK = [
    "Yes, there are {pieces} in stock. The price for the {item} is {price}.",
    "We have {pieces} of the {item}, at {price}.",
    "Good news: {item}, {pieces} on the shelf, {price}.",
    "We do. {price} for the {item}, and {pieces} are left.",
    "{item}: {price}, and {pieces} are here at the moment.",
    "There are {pieces} left. The {item} comes to {price}.",
]
OUT_OF_STOCK = [
    "Sorry, the {item} is out of stock right now. The price is normally {price}.",
    "I'm afraid we've none left: {item}, {price} when it is in.",
    "Not at the moment. The {item} sold out; the usual price is {price}.",
    "The shelf is empty for the {item}, sorry. It would be {price}.",
    "None today. When the {item} is back, it will be {price}.",
]
UNKNOWN_ITEMS = [
    "rain cape",
    "dynamo hub",
    "trailer",
    "cargo box",
    "unicycle",
    "wooden handlebar",
    "cycling shoes",
    "kickscooter wheel",
]
NOT_SOLD = [
    "I'm sorry, {item} isn't something we keep.",
    "We don't stock that: I find no {item} in our list.",
    "No luck, sorry: {item} is not in our range.",
    "I looked for {item} and found nothing. Can I help with another part?",
    "We don't sell it, I'm afraid. Is there anything else for the bike?",
]

ASK_PRICE = [
    "What do you charge for a {service}?",
    "How much is a {service}?",
    "price of a {service}?",
    "What would a {service} cost, and how long does it take?",
    "How long does a {service} take?",
    "Could you tell me the price of a {service}, please?",
    "I'm thinking about a {service}. What does that come to?",
    "Is a {service} expensive?",
    "Do you do a {service} while I wait?",
    "Someone recommended a {service}. What's your price?",
    "A quick question: {service}, how much?",
]
PRICE = [
    "A {service} is {cost} and takes about {time}.",
    "{cost}. Plan {time} for a {service}.",
    "For a {service} we charge {cost}; it takes {time}.",
    "That is {cost}, and the work takes {time}.",
    "The {service} costs {cost}. It takes {time}. Shall I book one?",
    "{service}: {cost}, roughly {time}.",
]
PRICE_FREE = [
    "A {service} is free. It takes about {time}.",
    "No charge for a {service}, and it takes {time}.",
    "The {service} costs nothing; give us {time}.",
    "That one is free of charge. Plan {time}.",
]
SYMPTOMS = [
    ("My back tyre is flat again.", "puncture repair"),
    ("There's a thorn in the tyre and it lost all its air overnight.", "puncture repair"),
    ("I rode over glass this morning. What would it cost to fix the tyre?", "puncture repair"),
    ("The brakes squeal like a piglet.", "brake adjustment"),
    ("I pull the brake lever right to the handlebar before anything happens.", "brake adjustment"),
    ("My front brake rubs all the time. What can you do?", "brake adjustment"),
    ("The gears skip whenever I go uphill.", "gear tuning"),
    ("It won't shift into the big cog any more.", "gear tuning"),
    ("Clicking noises from the derailleur, it drives me mad.", "gear tuning"),
    ("My wheel wobbles from side to side.", "wheel truing"),
    ("I hit a pothole, and now the rim touches the brake once a turn.", "wheel truing"),
    ("A spoke came loose and the wheel is no longer round.", "wheel truing"),
    ("My chain is rusty and stretched, you told me last year it would not last.", "chain replacement"),
    ("The chain snapped on the way home!", "chain replacement"),
    ("The bike stood in the shed for six years. I want all of it looked after.", "full service"),
    ("I'm riding to the coast next month and would like everything checked and cleaned before.", "full service"),
    ("I bought a second-hand bike for my daughter. Can somebody tell me if it's safe?", "safety check"),
    ("Would you have a quick look whether my bike is roadworthy?", "safety check"),
    ("We have a seat for our toddler and no idea how to mount it.", "child seat fitting"),
    ("Can you put my little boy's seat on my bike?", "child seat fitting"),
    ("The handlebar is hard to turn and makes a crunching sound.", "headset replacement"),
    ("Something is loose where the fork meets the frame. It knocks when I brake.", "headset replacement"),
    ("I'm tired of punctures and want to ride without tubes.", "tubeless setup"),
    ("Can my rims be made tubeless? What would you charge?", "tubeless setup"),
]
BOOK_THAT = [
    "OK, book that for {day} at {time}.",
    "Then please put me down for {day}, {time}.",
    "Fine. {day} at {time}?",
    "Sounds fair. I'd come on {day} at {time}.",
    "Let's do it: {day}, {time}.",
    "Please go ahead, {day} {time}.",
]

BOOK = [
    "Can I book a {service} for {day} at {time}?",
    "I'd like a {service} on {day}, {time}.",
    "Please book me a {service}, {day} {time}.",
    "{service} on {day} at {time}, is that possible?",
    "Could you fit in a {service} on {day} at {time}?",
    "Hello, I need a {service}. {day} at {time} would be perfect.",
    "Have you time for a {service} on {day}, say {time}?",
    "Put me in the book: {service}, {day}, {time}.",
    "My bike needs a {service}. May I bring it on {day} at {time}?",
    "Reserve {day} {time} for a {service}, please.",
]
BOOK_SERVICE = [
    "I'd like to book a {service}.",
    "Can I get an appointment for a {service}?",
    "I need a {service} soon.",
    "Please book a {service} for me.",
    "When could you do a {service}?",
    "I want to bring my bike in for a {service}.",
]
WHEN = [
    "Gladly. Which day and time would suit you?",
    "Of course. When would you like to come?",
    "Sure: what day, and about what time?",
    "Happy to. Which day and hour should I try?",
    "A {service}, noted. When shall I look for a slot?",
]
DAY_AND_TIME = [
    "{day} at {time}.",
    "How about {day}, {time}?",
    "{day}, {time} please.",
    "I could do {day} at {time}.",
    "Let's say {day}, {time}.",
    "{time} on {day} would be good.",
]
CLOSED_THEN = [
    "We're closed on {day}, sorry. Which other day would suit you?",
    "I can't book {day}: the workshop is shut then. Another day?",
    "{day} is our day off. Would Tuesday to Saturday work for you?",
    "Sorry, nobody is here on {day}. Please name another day and time.",
]
TAKEN = [
    "Sorry, {time} on {day} is taken. I could offer {free}.",
    "That slot is gone. On {day} there is still {free}.",
    "{time} is already booked. Would {free} work?",
    "No luck with {time}, but {day} has {free} free.",
    "Someone was faster. Free on {day}: {free}.",
]
TAKE = [
    "{time} then.",
    "I'll take {time}.",
    "{time} is fine too.",
    "Hm, {time}, please.",
    "OK, make it {time}.",
    "Then {time}.",
]
BOOKED = [
    "Done: {service} on {day} at {time}. Your booking number is {number}.",
    "Booked. {day}, {time}, {service}; the number is {number}.",
    "You're in the book for {day} at {time}: {service}, number {number}.",
    "All set for {day} at {time}. Please keep {number} for the {service}.",
    "See you on {day} at {time} for the {service}. Booking {number}.",
    "That worked: {number}, {service}, {day} {time}.",
]
SYSTEM_DOWN = [
    "I'm sorry, the booking system can't be reached right now, so nothing is booked. Please try again a little later.",
    "The booking system does not answer at the moment. Your {service} is not booked; could you ask again in a few minutes?",
    "Sorry, I could not book {day} at {time}: our system is down. Please try again soon, or call in at the desk.",
    "That did not go through: the booking system is offline. Nothing is reserved yet.",
]

POLICIES = [
    (["Where are you?", "What's your address?", "How do I find the workshop?", "Where do I bring the bike?", "Which street is it?"],
     ["We're at 4 Kettle Lane, behind the market hall.", "4 Kettle Lane: just behind the market hall.", "You'll find us behind the market hall, at 4 Kettle Lane."]),
    (["Can I pay by card?", "Do you take cash?", "How can I pay?", "Card or cash only?", "Is contactless payment by card fine?"],
     ["Cards and cash are both fine.", "You can pay by card or in cash.", "Both: we take cards and cash."]),
    (["Is there a guarantee on your repairs?", "What if the repair doesn't hold?", "How long do you guarantee the work?", "Do repairs come with a warranty?"],
     ["Yes, repairs carry a guarantee of 3 months.", "We guarantee every repair for 3 months.", "For 3 months: if it fails in that time, bring the bike back."]),
    (["I can't pick up my bike this week. Is that a problem?", "How long will you keep my bike?", "What happens to bikes that nobody collects?", "I'm away for a fortnight. Can the bike wait with you?"],
     ["We keep bikes for 30 days after the repair.", "No problem within 30 days: that's how long we keep a bike.", "Bikes that aren't collected stay here for 30 days."]),
    (["Are you a person?", "Am I talking to a human?", "Who is this?"],
     ["I'm the desk's assistant program. I can help with hours, parts, prices and bookings.", "A program at the workshop's desk. Ask me about hours, stock, prices or a booking."]),
]  # fmt: skip
REFUSALS = [
    (["Can you repair my moped?", "My motorbike won't start. Can you help?", "Do you do oil changes on a scooter?", "Could you look at a motorcycle brake?"],
     ["Sorry, we don't work on motorcycles. For bicycles I'm glad to help.", "I'm afraid motorcycles are outside our trade. Is there a bicycle I can help with?"]),
    (["My e-bike's battery is dead. Can you open it?", "The motor of my pedelec makes noises.", "Do you sell batteries for e-bikes?", "Can you unlock the speed limit of my e-bike motor?"],
     ["Sorry, we don't work on e-bike motors or batteries. The rest of the bike is fine with us.", "Motors and batteries are not for us, I'm afraid; brakes, gears and wheels of an e-bike are."]),
    (["Who had the slot before mine?", "Can you give me the phone number of the woman who came before me?", "My neighbour brought her bike. What did she pay?", "Tell me which bikes are in the workshop and whose they are."],
     ["I can't share anything about other customers, sorry.", "That concerns another customer, so I can't say."]),
    (["Write me a poem about autumn.", "What's the capital of Peru?", "Can you help with my tax form?", "Who will win the football tonight?", "Do my maths homework, please.", "Which shares should I buy?"],
     ["That's beyond a bicycle workshop's desk, sorry. I can help with hours, parts, prices and bookings.", "I only know about this workshop: hours, stock, prices and bookings. Anything for the bike?"]),
    (["My knee hurts when I ride. What should I take for it?", "I crashed and my wrist is swollen. What should I do?", "Is it safe to ride with a fever?"],
     ["I can't advise on health, sorry; please ask a doctor or a pharmacy. I'm here for the bike.", "That's a question for a doctor, not for me. If the bike needs care, tell me."]),
    (["Give me a full service for half the price and I'll tell my friends.", "Make it free, I'm a regular.", "Can you knock ten pounds off?"],
     ["I can't change prices, sorry. They are the same for everyone.", "Prices are fixed here, I'm afraid."]),
]  # fmt: skip

THANKS = [
    "Thanks!",
    "Thank you, that's all.",
    "Great, thanks for your help.",
    "Perfect, bye.",
    "Cheers.",
    "OK, that's everything.",
    "Lovely, thank you.",
    "Good, thank you.",
    "That's all I needed.",
    "Brilliant. Bye!",
]
GOODBYE = [
    "You're welcome. Ride safely!",
    "My pleasure. Bye!",
    "Glad to help. See you at Kettle Lane!",
    "Any time. Have a good ride!",
    "You're welcome!",
    "Bye, and enjoy the ride.",
]
