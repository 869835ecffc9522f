"""How far references, formulas and libraries are from float64, and the table of tolerances that follows from it."""
