"""What a customer wants, in 24 intents: sentences that the project generates itself, for demos and tests without any download.

The one idea: a grammar of templates, slots, politeness, fillers and typing mistakes, cut in three before anything is drawn.
Training, validation and dev sentences come from different templates, and dev also from slot values and small talk of its own, so
that a model has to understand and not remember; intents share their words ("I don't want to cancel, just change the date").
The same options give the same sentences, everywhere. It is no benchmark: figures on it say nothing about other data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from slimformer.errors import RecipeError
from slimformer.tasks.base import Example, Features, Outputs, Split, Task
from slimformer.tasks.classification import CLASS_METRICS, Classification, bound_names

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig

# One template a line. (a|b) is a choice, {slot} a value. After --: templates for dev only. Every VALIDATION_EVERY-th of the
# training templates is for validation only.
GRAMMAR: Mapping[str, str] = {
    "cancel_order": """
        (I want to|I'd like to|I need to) cancel (my order|order {order}|the order for the {item})
        (please cancel|cancel) (order {order}|my order for the {item}) (before it ships|right away|today)
        how (do|can) I cancel an order I placed {when}
        I ordered the {item} by mistake, (please cancel it|can you cancel it)
        can you stop (order {order}|my order) before it is (sent|shipped)
        I changed my mind about the {item}, (cancel the order please|I want to cancel)
        I no longer need the {item}, is it too late to cancel the order
        I don't want to change anything, I want order {order} cancelled
        found the {item} cheaper elsewhere so (I want to cancel|please cancel) my order
        my {person} already bought the {item}, please cancel mine
        please don't send the {item}, I won't be needing it
        is there still time to call off order {order}
        I pressed buy twice, one of the two orders for the {item} has to go
        forget about the {item} I ordered {when}, it hasn't left your warehouse yet
        not a return, nothing has been sent yet, I just don't want the {item} any more
        call off the order for the {item} please
        --
        please call off my order {order}, I don't need it any more
        (can you still|is it possible to) cancel the {item} I ordered {when}
        I've decided against the {item}, please cancel order {order}
        cancel what I ordered {when}, it has not been sent yet
        the order for the {item} was a mistake, I'd like it cancelled
        I pressed buy twice, please cancel one of the two orders
        """,
    "change_order": """
        (can I|could I|I'd like to) add a {item} to (my order|order {order})
        please change the {item} in order {order} to a {item2}
        I picked the wrong (size|colour) for the {wear}, can you change it before it ships
        (please remove|take) the {item} (from|out of) order {order} but keep the {item2}
        I want to (change|edit) my order {order}, not cancel it
        I ordered one {item}, can you make it two before you pack order {order}
        I forgot to add a {item} when I ordered {when}
        is it possible to (edit|modify) an order that has not shipped yet
        I'd like (blue|green|the larger one) instead of (red|black|the small one), order {order} is still being packed
        how do I change the quantity in my order
        instead of one {item} I need three, the order is {order}
        order {order} is not packed yet I hope, make the {item} a {item2} please
        could you put a {item} in the same box as order {order}
        leave the {item} out but send me the rest of order {order}
        I haven't received it yet and I don't want to call it off, I only need one more {item} in it
        I'd like one more {item} with order {order} before it ships
        please take one {item} off order {order} and leave the rest
        --
        can you put one more {item} into order {order}
        I'd like a {item} instead of the {item2} in my order, it has not shipped yet
        please take the {item} off my order, the rest can stay
        is there still time to change what is in order {order}
        could I get two instead of one {item} in order {order}
        I don't want to cancel order {order}, just add a {item} to it
        """,
    "track_parcel": """
        where is my (order|parcel|package)
        (can you tell me|I want to know) where (order {order}|my {item}) is (right now|at the moment)
        when will (order {order}|my {item}) (arrive|be delivered)
        I (need|would like) the tracking number for order {order}
        the tracking page (hasn't changed|shows nothing new) since {since}
        has my {item} been (shipped|sent) yet
        how do I (track|follow) my (parcel|order)
        what is the status of (order {order}|my delivery)
        is my {item} still coming on {day}
        which courier is bringing my {item}
        it's been a week, any news on the {item} I ordered
        could you check how far order {order} has got
        the link in your mail only says in transit, how long will that take
        will somebody ring my bell with the {item} on {day} or later
        my {item} is late, where is it now
        is order {order} still in your warehouse or on its way
        --
        can you see where my {item} is now
        my {item} should be here by now, where is it
        I'd like to follow my parcel, what is the tracking number
        how long until order {order} (arrives|gets here)
        has order {order} left your warehouse already
        I don't want to move the delivery, I only want to know when it comes
        """,
    "missing_parcel": """
        it says delivered but (I never got my {item}|there is no parcel here)
        my (parcel|package) is marked as delivered and I (have nothing|did not receive it)
        order {order} (never arrived|never came) although the courier says it was handed over
        I think my {item} was (stolen|lost) on the way
        the driver says he left the {item} at the door but there is nothing there
        my {person} and I looked everywhere, the delivered parcel is not here
        the courier lost my (parcel|{item})
        somebody signed for order {order} and it was not me
        I have been waiting for three weeks, the {item} must be lost
        my neighbour was supposed to have the package but (he|she) has nothing
        your site claims I received the {item} {when}, I did not
        tracking says it's with a neighbour and none of them has seen it
        order {order} has vanished, nobody here ever got it
        I know where the tracking says it is, at my home, only it isn't here
        the delivery photo does not show my door
        --
        according to the tracking my {item} was delivered, but I don't have it
        the parcel with my {item} never reached me although it is marked as delivered
        the courier claims he delivered order {order}, nobody here got it
        I fear that my parcel got lost, I have waited for it since {since}
        somebody must have taken my parcel from the doorstep
        the photo shows my parcel at a door that isn't mine
        """,
    "damaged_item": """
        the {item} arrived (broken|damaged|scratched)
        my {item} was (broken|cracked|in pieces) when I opened the box
        the {device} I got {when} (doesn't work|won't switch on|stopped working after a day)
        there is a (crack|dent|hole|big scratch) in the {item}
        the box was (crushed|wet|torn) and the {item} inside is damaged
        one part of the {item} is (missing|broken)
        I received a (faulty|defective) {item}
        the {item} from order {order} fell apart after one use
        (a button|the cable|the cover) of the {device} is broken, I only got it {when}
        what do I do with a {item} that came broken
        I unpacked the {item} and it is smashed
        my new {device} gave up on the first evening
        the {device} gets hot and has made a strange noise since {since}
        something rattles inside the {device} and it will not start
        the {device} switches itself off all the time
        it is the correct {item}, but it has a broken edge
        --
        my {device} broke on the first day
        when I unpacked the {item} it was already broken
        the {device} is faulty, it (does not start|turns itself off)
        the {item} came with scratches all over
        the parcel was badly packed and the {item} got damaged
        the {item} is the right one, but one corner is bent
        """,
    "wrong_item": """
        I (received|got) a {item} instead of a {item2}
        you sent me the wrong (item|product|thing)
        I ordered a {item} and got a {item2}
        this is not what I ordered, I wanted the {item}
        the (size|colour) of the {wear} is not the one (I ordered|on my order)
        order {order} contains (something else|someone else's things)
        there is a {item} in my parcel that I never ordered
        (wrong article|wrong product) in the box, it should have been a {item}
        the label says {item} but there is a {item2} in the box
        I asked for a large {wear} and you shipped a small one
        I opened the parcel and found a {item}, mine was supposed to be a {item2}
        why did I get a {item}, it is fine but I never asked for one
        my order said blue, what came is brown
        nothing is broken, it's just not the {item} that I chose
        I wanted the {wear} in blue and got it in red
        wrong {item} delivered, mine is something else
        --
        there was a {item} in the box, I ordered a {item2}
        you shipped a {item}, that's not what I asked for
        I got the wrong {item}
        order {order} came with the wrong product in it
        I ordered the {wear} in black and received a white one
        somebody in your warehouse mixed up my {item} with a {item2}
        """,
    "return_item": """
        (I want to|I'd like to|how do I) (return|send back) the {item}
        (can|could) I get a return label for (order {order}|the {item})
        the {wear} doesn't (fit|suit me), I want to send it back
        how (long|many days) do I have to return (something|the {item})
        where do I (drop off|take) a return
        I don't like the {item} and want my money back for it
        I want to return the {item}, not exchange it
        is returning the {item} free
        I need a label to send the {item} from order {order} back
        can I return the {item} without the original box
        the {item} is not for me, how does it get back to you
        I'd like to give the {item} back and get my money
        do you collect things that people don't want to keep
        do you still accept the {item} if it has been unpacked
        until when may I send things back
        is it too late to bring the {item} back
        --
        I would like to give back the {item}, how does that work
        please send me a return label, I don't want to keep the {item}
        I'm not happy with the {item} and want to send it back
        until when can I return the {item} I bought {when}
        is it too late to return order {order}
        please take the {item} back, a different one is no use to me
        """,
    "exchange_item": """
        (I want to|I'd like to|can I) exchange the {item} for a {item2}
        can I (swap|exchange) the {wear} for (a bigger one|a smaller one|another colour)
        the {wear} is too (small|big|tight), I need the next size
        I got the {wear} {when} and want (another colour|a different size) instead
        I'd like to exchange the {item}, I don't want a refund
        how do (exchanges|I exchange something) work
        can you send me a (larger|smaller) {wear} and take this one back
        is it possible to exchange a {item} that was a gift
        please replace the {wear} with the same one in (medium|large)
        I want a different {item} in return for the one I have here
        the {wear} fits badly, one number up would be perfect, can we trade
        I have the {item} here but would prefer a {item2}, I'll send mine back
        my {person} gave me the {item}, could I have a {item2} for it
        it's the {wear} I ordered, only too long, may I have a shorter one
        --
        could I have the {wear} in another size, this one doesn't fit
        I want to swap the {item} I got {when} for a {item2}
        please exchange my {wear} for the same one in (black|blue)
        is an exchange possible if the {wear} is too large
        I'd rather have a {item2} than this {item}, can we exchange it
        keep the money, just let me have the {wear} in green rather than grey
        """,
    "refund_status": """
        where is my refund
        when (will|do) I get my money back for the {item} (I returned|I sent back)
        I returned the {item} {when} and (have not been refunded|my refund is not here)
        how long does a refund take
        you (promised|confirmed) a refund for order {order}, I still see nothing
        has my refund for (order {order}|the {item}) been (processed|sent)
        I cancelled order {order} {when} and still don't have my money
        the refund of {amount} (has not arrived|is not on my account)
        did you receive my return, I am waiting for my money
        my refund is (late|overdue)
        the {item} has been back with you since {since}, my {amount} hasn't
        you got your {item}, and what about my money
        I still haven't seen the {amount} you owe me for the return
        can you check whether you have paid me back for order {order}
        still no refund for the {item}, how long must I wait
        --
        I sent the {item} back, when do I get my {amount}
        the refund for my {item} still hasn't arrived
        have you already refunded order {order}
        how much longer must I wait for my refund
        you have had my return since {since} and I have no money yet
        it was called off {when}, by now you should have returned the {amount}
        """,
    "change_address": """
        (I want to|I need to|can I) change the (delivery|shipping) address (of order {order}|for my order)
        please send order {order} to {street} in {city} (instead|and not to my old address)
        I (moved|am moving) to {city}, please update my address
        I (typed|entered) the wrong (street|house number|postcode) for order {order}
        can you deliver the {item} to my (office|{person}) instead
        my new address is {street}, {city}
        the address on order {order} is wrong
        how do I (change|correct) my address
        the parcel would go to my old flat, I live at {street} now
        I'd like my {item} delivered to another address, not on another day
        I don't live in {city} any more, please make a note of {street}
        I won't be home but my {person} at {street} could take the {item}
        order {order} is on its way to a place I left {when}
        I forgot the flat number, it should say {street}
        bring the {item} to my office at {street}, not to my home
        --
        please deliver my order to {street} and not to my old flat
        I have a new address now, it is {street} in {city}
        can order {order} still go to a different address
        the (street|city) in my address is wrong, it should be {street}
        since {since} I live in {city}, where do I change my address
        could the courier bring it to {street} rather than to my home
        """,
    "change_delivery_date": """
        (can I|could you|I'd like to) (move|change) the delivery (to|until) {day}
        (I won't be|nobody is) home on {day}, can you deliver (another day|later)
        please deliver order {order} on {day} instead
        I don't want to cancel, just change the (date|day) of the delivery
        can my {item} come (earlier|later) than planned
        I need a (different|new) delivery (slot|time) for order {order}
        is it possible to (postpone|reschedule) my delivery
        could the driver come in the (morning|evening) on {day}
        I am on holiday until {day}, please hold my parcel
        I missed the courier {when}, when can he come again
        {day} doesn't suit me, is {day2} possible for the {item}
        please don't ring before {day}, I'm away
        keep the {item} at your depot for some days, I am not around
        we have to find another afternoon for order {order}
        {day} is no good for me, can the {item} come on {day2}
        the address is fine but nobody will be there before {day}
        --
        could you bring the {item} on {day} instead of {day2}
        I'm not at home on {day}, please choose another day for the delivery
        I'd like order {order} to arrive later, on {day} if possible
        can we find a new date for my delivery
        {day} does not suit me for the delivery of the {item}
        the address is right, but I'm only there from {day}
        """,
    "payment_failed": """
        my payment (failed|did not go through|was declined)
        I can't pay, the (checkout|page) shows an error
        my {card} is (declined|rejected) although there is enough money on it
        I tried to pay for the {item} (three times|again and again) and it (fails|does not work)
        the checkout says my {card} is not valid
        why was the payment for order {order} (declined|refused)
        paying with {card} doesn't work
        I get an error when I (enter my card|confirm the payment)
        the payment page (freezes|stays blank|never loads)
        my bank says all is fine but you (refuse|decline) my card
        I press pay and it sends me back to the basket
        your shop won't take my {card}, what is wrong
        it has been turning since I confirmed the {amount} with my bank
        I don't want to use another card, I want to know why this one is not accepted
        I can't finish my order, the payment does not work
        --
        I can't complete my order because my {card} is declined
        the payment of {amount} does not go through
        every time I try to pay I get an error message
        your checkout does not accept my {card}
        why can't I pay for the {item}, the page stays blank
        nothing was taken from my account, the order for the {item} just stops at the payment
        """,
    "double_charge": """
        I was charged twice for (order {order}|the {item})
        you (took|charged) {amount} two times
        there are two payments (of {amount}|for the same order) on my statement
        I paid once but my {card} was charged (twice|two times)
        why (do I see|are there) two charges from you
        my account was debited twice {when}
        I see a charge of {amount} that I (don't recognise|did not make)
        you charged me (too much|more than the price) for the {item}
        I bought one {item} but paid for two
        please give me back the second payment for order {order}
        the same {amount} left my account again {when}
        my statement shows you three times, I only shopped once
        the {item} costs {amount} but a higher sum was taken
        one order, two debits, how come
        the payment worked but it was taken two times
        --
        I have been charged two times for one {item}
        {amount} was taken from my {card} twice
        there is a second charge on my card for order {order}
        you debited {amount} twice {when}, I ordered only once
        I was charged more than the {item} costs
        the payment worked, a bit too well, it was taken again
        """,
    "invoice_copy": """
        (I need|can I get|please send me) (an invoice|a receipt) for order {order}
        (where|how) (can I find|do I download) my invoice
        I never got a receipt for the {item}
        can you (send|mail) me the (bill|invoice) again
        I need an invoice with (my company's name|the tax number) on it
        my accountant wants the (invoice|receipt) for the {item}
        please put {street} on the invoice of order {order}
        I lost the receipt of the {item} I bought {when}
        could I have the invoice as a pdf
        the invoice for order {order} is missing from the parcel
        my boss only pays me back the {amount} if I show something in writing from you
        is there a paper that proves I bought the {item}
        the bill has the wrong company on it, please issue a new one
        the parcel came without any bill
        I bought the {item} {when} and need a receipt
        --
        could you send me the invoice of order {order} once more
        I need a receipt for the {item} I bought {when}
        where is the invoice for my {item}
        I have no bill for order {order}, please mail it to me
        my company needs an invoice for the {item}
        for my taxes I need proof of the {amount} that I spent
        """,
    "change_card": """
        (I want to|I need to|how do I) (change|update) my (credit card|payment method)
        I have a new {card}, (where do I enter it|please use that one)
        my card (expired|expires on {day}), how do I add the new one
        please (remove|delete) my old {card} from my account
        can I pay by {card} instead of {card2} from now on
        I'd like to add a second card to my account
        the bank sent me a new card number, (please update it|where do I put it)
        how do I set {card} as my default payment
        switch my {plan} to another card
        my old card was stolen, I need to replace it in my account
        from next month please take the money from my {card}
        the number you have on file for my {card} is not good any more
        I closed that bank account, future bills should go to the {card}
        can I get rid of the {card} in my profile and keep only the {card2}
        I don't want to end my {plan}, I only have a new card for it
        I want to take a card out of my profile
        --
        I'd like to pay with my {card} from now on, where do I change that
        please use my new {card} for future payments
        the card in my account has expired, I want to enter another one
        how can I remove my {card} from my profile
        can I replace the card you have for my {plan}
        I don't want to stop the {plan}, only to pay for it by {card}
        """,
    "promo_code": """
        my (promo code|discount code|voucher) {code} (does not work|is not accepted)
        the code {code} is (invalid|expired) but I got it {when}
        how do I (use|enter|redeem) a (voucher|gift card|discount code)
        I forgot to (enter|use) my code {code} for order {order}
        can I (combine|use) two codes on one order
        the discount (was not applied|is missing) on order {order}
        where do I type in my code at the checkout
        is there a discount for (students|new customers)
        your newsletter promised me ten percent off, the checkout shows the full price
        how much is left on my gift card
        {code} gives me nothing off the {item}
        my {person} gave me a card worth {amount}, how do I spend it with you
        the checkout tells me {code} was already used, it wasn't
        are there any special offers for the {item} right now
        I typed {code} and still had to pay the full price
        --
        the checkout does not take my discount code {code}
        I entered {code} and the price did not change
        how can I use the voucher my {person} gave me
        I have a gift card over {amount}, where do I enter it
        can I still get the discount for order {order}, I forgot to enter {code}
        I paid the full {amount} although I typed {code}
        """,
    "reset_password": """
        I forgot my password
        (how do I|I want to|can you help me) reset my password
        the password reset (mail|link) (never arrives|does not work|has expired)
        I can't remember (my password|what password I used)
        please send me a new password
        (I need|I want) to set a new password
        I don't get the mail to reset my password at {email}
        how can I change my password
        I never chose a password, how do I log in
        the site says my password is wrong, I need a new one
        what were the letters I log in with, I can't think of them
        your link for choosing new login details is dead
        I'd like a safer password than the one I have
        it has been so long that I don't know what to type under my user name
        nobody blocked me, I just forgot my password
        --
        I don't know my password any more
        can you send me the link to choose a new password
        the mail for resetting my password did not come
        I need help to change my password
        my password is forgotten, what do I do now
        I am not blocked, I simply don't know the password for {email}
        """,
    "account_locked": """
        my account (is|has been) (locked|blocked|suspended)
        I (typed|entered) the wrong password too often and now I am locked out
        (please unlock|can you unblock) my account {email}
        why was my account (blocked|suspended|disabled)
        it says too many attempts, when can I log in again
        I can't log in although my password is right
        the login code never comes (to my phone|by text message), so I can't get in
        your site says my account is temporarily disabled
        I know my password but the login is refused
        I lost the phone for the second step of the login
        you shut me out of my own account, I did nothing wrong
        after five tries it won't let me in until {day}
        there is a message about unusual activity and nothing opens
        a fresh password didn't help, I am still kept out
        --
        I am locked out of my account since {since}
        my account was blocked and I don't know why
        please open my account again, I typed a wrong password a few times
        I can't get into my account, it says it is suspended
        my login is blocked although I use the right password
        I have a new phone and now I can't get past the login code
        """,
    "change_email": """
        (I want to|how do I|can I) change (my email address|the email of my account)
        please (change|update) my email to {email}
        my new (mail address|email) is {email}
        I (no longer use|lost access to) {email}, please use another address for my account
        there is a typo in my email address, it should be {email}
        your mails go to an address I don't use any more
        I registered with the wrong email
        I would like to log in with {email} from now on
        can you replace my old email by {email}
        I don't want to close the account, just use another email
        please write to {email} in future
        my provider shuts down, so {email} will be the way to reach me
        I misspelled my contact details when I signed up, correct is {email}
        all your messages land at my former job, can we change that
        I still get the invoices at {email}, I want them somewhere else
        send all mails to {email} instead of my old job
        --
        please use {email} as my new email address
        can I register another email address for my account
        my old email no longer works, please change it to {email}
        the email in my profile is wrong, correct is {email}
        from now on I want to get your mails at {email}
        I still get the mails at my old job, please send them to {email}
        """,
    "close_account": """
        (I want to|how do I|please) (close|delete) my account
        please delete all my (data|personal details)
        I no longer want to be a customer, remove my account
        I don't shop here any more, (delete my profile|close my account)
        (can you|I want you to) erase everything you know about me
        how can I delete my profile for good
        take me off your customer list and delete {email}
        close the account of {email}
        I have two accounts, please delete the one with {email}
        I don't want to pause anything, I want my account gone
        I am done with your shop, nothing of mine should stay with you
        please forget me, that is my right under privacy law
        after this order I'm leaving, how do I sign off for ever
        my late {person} was registered with you, please remove the entry
        please remove the account with the address {email}
        --
        I'd like you to delete my account and all my data
        how can I get my profile removed
        I don't want to be your customer any more, delete everything
        please close the account that belongs to {email}
        I don't need my account any longer, how do I delete it
        please forget me, wipe my data, an unsubscribe link is not enough
        """,
    "cancel_subscription": """
        (I want to|I'd like to|how do I) (cancel|end|stop) my {plan}
        please (cancel|end) the {plan} (at the end of the month|right now|from {day})
        I don't want to renew my {plan}
        how do I turn off automatic renewal
        stop (charging me|taking money) for the {plan} every month
        the {plan} is too expensive, cancel it
        I signed up for the free trial and want to cancel before I pay
        my {plan} was renewed and I don't want it
        I don't want a break, I want to cancel the {plan} for good
        I no longer need the {plan}, but keep my account
        {day} should be the last time that I pay for the {plan}
        I have no use for the {plan} any more
        let my {plan} run out please
        the trial is over on {day}, make sure that I am not billed
        no more monthly boxes for me, one order now and then is enough
        I don't use the {plan} any more, please end it
        --
        I'd like my {plan} to end on {day}
        I don't want the {plan} any more, please cancel it
        where can I cancel my {plan}
        please do not renew my {plan}, I don't use it
        the trial of the {plan} ends on {day}, I don't want to go on
        no more {plan} for me, but leave my account as it is
        """,
    "pause_subscription": """
        (can I|I'd like to|how do I) pause my {plan}
        please (pause|freeze|suspend) the {plan} until {day}
        I am away for (a month|the summer), can you pause the {plan}
        I want to skip (the next box|one month) of my {plan}
        don't cancel my {plan}, just pause it
        can I take a break from the {plan}
        put my {plan} on hold (for two months|until {day})
        is it possible to skip a delivery of the {plan}
        how long can a {plan} be paused
        I want to start my {plan} again after {day}
        no {plan} in August please, in September I'm back
        I have too much left, leave out the next round of the {plan}
        I'd like to come back to the {plan} later, nothing until {day} please
        I don't want to end my {plan}, I only need a break until {day}
        leave out the next box of the {plan}, I am on holiday
        --
        I'd like to take a break from my {plan} until {day}
        please skip the next delivery of my {plan}
        can you put the {plan} on hold while I am in {city}
        my {plan} should pause for (a month|two months)
        I won't be home for some weeks, please freeze the {plan}
        I won't cancel the {plan}, but I can't use it until {day}
        """,
    "stock_check": """
        (is|do you have) the {item} (in stock|available)
        when will the {item} be (back|available again)
        do you have the {wear} in (blue|green|large|another size)
        is the {item} available in your store in {city}
        will the {item} come back into your shop
        the {item} is sold out, when can I order it
        how many of the {item} do you have left
        can you (reserve|put aside) a {item} for me in {city}
        please tell me when the {item} is back in stock
        I want to buy the {wear} but the size I need is greyed out
        could I walk into your shop in {city} and take the {item} home
        the page of the {item} has no buy button, are there none
        do you still sell the {item} that I saw {when}
        I'd order the {item} today if you have it there
        --
        do you still have the {item} in stock
        I'd like to know when the {item} can be ordered again
        is the {wear} available in (black|medium|small)
        can I find the {item} in your shop in {city}
        the {item} is out of stock, will it come back
        is there any {wear} left in brown or has everything been sold
        """,
    "talk_to_human": """
        (I want to|can I|let me) (talk|speak) to (a human|a person|an agent|someone)
        (connect me|put me through) to (customer service|your team|an agent)
        what is your phone number
        I don't want to chat with a bot
        (can someone|please) call me back (on {day}|today|about order {order})
        you don't understand me, give me a real person
        I want to (make a complaint|complain about your service)
        how can I reach (customer service|your support)
        I'd like to speak to (a manager|your boss) about order {order}
        is there anybody there who can help me
        stop sending me these automatic answers
        who can I ring about my {item}
        it's complicated, I'd rather explain it to somebody
        could one of your colleagues phone me on {day}
        nobody has answered my mails since {since}, I am really unhappy with you
        your service is bad, I want to complain to somebody
        --
        I'd like to talk to somebody from your team
        please let me speak with a real person about my {item}
        is there a number I can call
        could an agent call me on {day}
        I don't want an automatic answer, I want to talk to a human
        I am really unhappy with your service and want to complain
        """,
}

# Values for training | values for dev.
SLOTS: Mapping[str, str] = {
    "item": "desk lamp, rain jacket, coffee machine, pair of running shoes, kettle, backpack, office chair, keyboard, tent,"
    " wool coat, garden table, phone case, toaster, blender, watch, bookshelf, headset, suitcase, camera, mirror,"
    " vacuum cleaner, carpet, sweater, frying pan, monitor | rice cooker, hiking jacket, bedside table, e-reader, doormat,"
    " skateboard, electric drill, dressing gown, bike helmet, printer, sofa cover, hair dryer, baby seat, guitar stand",
    "wear": "rain jacket, wool coat, sweater, winter coat, pair of running shoes, shirt, belt, dress"
    " | hiking jacket, dressing gown, bike helmet, pair of gloves, cardigan, raincoat",
    "device": "desk lamp, coffee machine, kettle, keyboard, toaster, blender, watch, headset, camera, vacuum cleaner, monitor"
    " | rice cooker, e-reader, electric drill, printer, hair dryer, food mixer",
    "when": "yesterday, last week, on Monday, two days ago, this morning, on the weekend, last Friday, ten days ago"
    " | the day before yesterday, at the start of the month, on the 3rd, four weeks ago, last night",
    "since": "yesterday, last week, Monday, Friday, the weekend | Thursday, the start of the month, the 3rd, Tuesday",
    "day": "Friday, Monday, Saturday, the 14th, the 2nd of May, Sunday | Thursday, the 21st, Wednesday, the last day of June",
    "person": "sister, husband, mother, friend, son, flatmate | aunt, grandfather, daughter, colleague",
    "city": "Leeds, Dublin, Boston, Lyon, Toronto, Hamburg, Bristol | Turin, Denver, Cork, Utrecht, Cardiff",
    "street": "12 Park Road, 8 Mill Lane, 45 Station Street, 3 Hill View, 210 King Street, 17 Church Lane"
    " | 6 Orchard Close, 91 Harbour Way, 28 Abbey Terrace, 150 Maple Avenue",
    "email": "anna.k@mail.com, j.smith@post.net, maria77@web.org, tom.lee@mail.com, info@greenhouse.co"
    " | p.okafor@inbox.io, lena_b@fastmail.eu, office@brightside.dev, kim.1984@mymail.net",
    "amount": "$49.90, 20 euros, $15, 89.99, 35 pounds, $120 | 64 euros, $17.50, 210 pounds, $8.25",
    "card": "Visa card, Mastercard, debit card, credit card, PayPal | Amex, bank card, Apple Pay",
    "plan": "coffee subscription, Plus membership, monthly box, premium plan, magazine subscription, meal plan"
    " | tea club, Prime plan, weekly veg box, streaming package",
    "code": "WELCOME10, SAVE20, SPRING, FRIEND5, SUMMER15 | HELLO25, AUTUMN, VIP30, BDAY10",
}
OPENERS = (
    "hi, ; hello, ; hey, ; good morning, ; hello there, ; hi team, ; quick question: ; um, ; well, ; so "
    "| good evening, ; dear support, ; excuse me, ; ok so ; hiya, "
)
# Small talk that says nothing about the intent, though its words do: a model must not lean on single words.
BEFORE = (
    "I bought a {item} {when}. ; this is about order {order}. ; I have been a customer for years. ; I already wrote {when}. ;"
    " I looked at your help page. ; the app was no help. ; I ordered a {item} and a {item2}. ; my {person} told me to ask. ;"
    " I paid by {card}. ; I just logged in. "
    "| I placed an order {when}. ; sorry to bother you. ; my number is {order}. ; your colleague sent me here. ;"
    " I returned something last year and it went well. ; I use the {plan} too. ; I never had a problem before. "
)
AFTER = (
    " please ; , thanks ; , thank you ; , please help ; , can you help me? ; , it is urgent ; , please hurry"
    " | , many thanks ; , what should I do? ; , kind regards ; , sorry for the trouble ; , I'd be grateful"
)
OPENER_SHARE, BEFORE_SHARE, AFTER_SHARE, LOWER_SHARE, BARE_SHARE = 0.30, 0.22, 0.30, 0.35, 0.35
VALIDATION_EVERY = 5  # a fifth of the training templates of each intent
SALTS = {
    Split.TRAIN: b"train",
    Split.VALIDATION: b"held",
    Split.DEV: b"dev",
}  # they seed the draws: other bytes, other sentences
KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # a slip goes to the key on either side


@dataclass(frozen=True)
class Intents(Task):
    """Customer sentences with one of 24 intents: `examples` for training, `validation_share` of them set aside, and `dev` more.

    `typos`: share of sentences with a typing mistake or two. `seed` draws other sentences from the same grammar. `labels`:
    intents in the order of the model's ids; `bind` fills it.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    examples: int = 6000
    dev: int = 1200
    seed: int = 0
    typos: float = 0.2
    validation_share: float = 0.1
    max_length: int = 48
    metric: str = "accuracy"
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(map(str, self.labels)))
        fewest, share = 2 * len(GRAMMAR), self.validation_share
        mistakes = [
            *([] if self.examples >= 2 * fewest else [f"examples: at least {2 * fewest}, not {self.examples}"]),
            *([] if self.dev >= fewest else [f"dev: at least {fewest}, not {self.dev}"]),
            *([] if self.seed >= 0 else [f"seed: a whole number from 0, not {self.seed}"]),
            *([] if 0 <= self.typos <= 1 else [f"typos: a share from 0 to 1, not {self.typos}"]),
            *([] if 0 < share <= 0.5 else [f"validation_share: a share above 0 and up to 0.5, not {share}"]),
            *([] if self.max_length >= 4 else [f"max_length: at least 4 tokens, not {self.max_length}"]),
            *([] if self.metric in CLASS_METRICS else [f"metric: '{self.metric}'; known: {', '.join(CLASS_METRICS)}"]),
        ]
        if mistakes:
            raise RecipeError("the task intents cannot be set up like that.", facts=mistakes)

    def split(self, name: Split) -> Sequence[Example]:
        validation = max(1, round(self.validation_share * self.examples))
        count = {Split.TRAIN: self.examples - validation, Split.VALIDATION: validation, Split.DEV: self.dev}[Split(name)]
        sentences = _sentences(Split(name), count, self.seed, self.typos)
        return [Example(f"{Split(name)}/{row}", (text,), intent) for row, (text, intent) in enumerate(sentences)]

    @property
    def _judge(self) -> Classification:
        return Classification(kind="classes", metric=self.metric, labels=self.labels or tuple(sorted(GRAMMAR)))

    def bind(self, config: PretrainedConfig | Mapping[str, Any]) -> Intents:
        return replace(self, labels=bound_names(tuple(sorted(GRAMMAR)), config))

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Features:
        return self._judge.encode(examples, tokenizer, max_length)

    def configure(self) -> Mapping[str, Any]:
        return self._judge.configure()

    def loss(self, output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._judge.loss(output, batch)

    def divergence(
        self,
        student: Mapping[str, torch.Tensor],
        teacher: Mapping[str, torch.Tensor],
        batch: Mapping[str, torch.Tensor],
        temperature: float,
    ) -> torch.Tensor:
        return self._judge.divergence(student, teacher, batch, temperature)

    def score(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> dict[str, float]:
        return self._judge.score(outputs, features, examples)

    def answers(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> list[str]:
        return self._judge.answers(outputs, features, examples)

    def credit(self, outputs: Outputs, features: Features, examples: Sequence[Example]) -> np.ndarray:
        return self._judge.credit(outputs, features, examples)


def templates(name: Split, intent: str) -> list[str]:
    """The templates of an intent that a split draws from; no two splits share one."""
    training, dev = (
        [line.strip() for line in part.strip().splitlines()] for part in GRAMMAR[intent].split("\n        --\n")
    )  # fmt: skip
    if name is Split.DEV:
        return dev
    return [line for index, line in enumerate(training) if (index % VALIDATION_EVERY == 2) == (name is Split.VALIDATION)]


@lru_cache(maxsize=8)
def _sentences(name: Split, count: int, seed: int, typos: float) -> tuple[tuple[str, str], ...]:
    """`count` different sentences with their intents, each intent as often as any other, in a shuffled order."""
    generator = np.random.default_rng([seed, *SALTS[name]])
    lines = {intent: templates(name, intent) for intent in GRAMMAR}
    seen: set[str] = set()
    found = []
    for index in range(count):
        intent = tuple(GRAMMAR)[index % len(GRAMMAR)]
        for _ in range(20):  # some templates have few sentences: after that, a repetition is honest
            text = _sentence(lines[intent], name is Split.DEV, typos, generator)
            if text.lower() not in seen:
                break
        seen.add(text.lower())
        found.append((text, intent))
    return tuple(found[index] for index in generator.permutation(count))


def _sentence(lines: Sequence[str], dev: bool, typos: float, generator: np.random.Generator) -> str:
    core = _decided(_pick(lines, generator), generator)
    before = _pick(_values(BEFORE, dev, ";"), generator) + " " if generator.random() < BEFORE_SHARE else ""
    after = _pick(_values(AFTER, dev, ";"), generator) if generator.random() < AFTER_SHARE else ""
    opener = _pick(_values(OPENERS, dev, ";"), generator) + " " if generator.random() < OPENER_SHARE else ""
    joint = "" if after.startswith(",") or not after else " "
    text = _filled(f"{opener}{before}{core}{joint}{after}", dev, generator)
    if not text.endswith("?"):
        asks = re.match(r"(where|when|how|what|why|who|which|is|are|can|could|do|does|has|will)\b", core)
        text += "?" if asks and not after else "."
    if generator.random() < BARE_SHARE:
        text = text.rstrip("?.")
    text = text.lower() if generator.random() < LOWER_SHARE else _sentence_case(text)
    return _mistyped(text, generator) if generator.random() < typos else text


def _decided(text: str, generator: np.random.Generator) -> str:
    """One of each (a|b) taken."""
    return re.sub(r"\(([^()]*)\)", lambda match: _pick(match[1].split("|"), generator), text)


def _filled(text: str, dev: bool, generator: np.random.Generator) -> str:
    """Slots filled: one value per slot name, and {item2} never equals {item}."""
    used: dict[str, str] = {}
    for slot in dict.fromkeys(re.findall(r"\{(\w+)\}", text)):
        if slot == "order":
            value = _order_number(dev, generator)
        else:
            values = [value for value in _values(SLOTS[slot.rstrip("2")], dev, ",") if value not in used.values()]
            value = _pick(values, generator)
        used[slot] = value
        text = text.replace("{" + slot + "}", value)
    return re.sub(r"\ba(?= [aeio])", "an", text)


def _order_number(dev: bool, generator: np.random.Generator) -> str:
    number = int(generator.integers(10_000, 99_999))
    return f"no. {number}-{int(generator.integers(10, 99))}" if dev else f"{'#' if number % 2 else ''}{number}"


def _values(text: str, dev: bool, separator: str) -> list[str]:
    return [value.strip() for value in text.split("|")[dev].split(separator)]


def _pick(values: Sequence[str], generator: np.random.Generator) -> str:
    return values[int(generator.integers(len(values)))]


def _sentence_case(text: str) -> str:
    return re.sub(r"(^|[.?] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def _mistyped(text: str, generator: np.random.Generator) -> str:
    """One or two slips of the hand inside longer words: a neighbour key, a letter lost, doubled, or swapped with the next."""
    for _ in range(1 + int(generator.random() < 0.3)):
        inner = [match.start() for match in re.finditer(r"(?<=[a-z])[a-z](?=[a-z][a-z])", text)]
        if not inner:
            return text
        at = inner[int(generator.integers(len(inner)))]
        letter, following = text[at], text[at + 1]
        slip = _pick(["neighbour", "lost", "doubled", "swapped"], generator)
        text = text[:at] + {
            "neighbour": _beside(letter, generator) + following,
            "lost": following,
            "doubled": letter + letter + following,
            "swapped": following + letter,
        }[slip] + text[at + 2 :]  # fmt: skip
    return text


def _beside(letter: str, generator: np.random.Generator) -> str:
    row = next(keys for keys in KEYS if letter in keys)
    at = row.index(letter)
    return _pick(row[max(0, at - 1) : at] + row[at + 1 : at + 2], generator)
