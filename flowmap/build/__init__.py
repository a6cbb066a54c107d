"""From a resolved recipe to objects: student, teacher, data, prior, discriminator, fake score."""
