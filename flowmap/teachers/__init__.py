"""Floor 1: everything frozen: cards, exact teachers, guidance, networks that were trained."""
