"""csulora inside other programs: serving stacks and PEFT."""
