// In place of the theme's file of this name, which weighs half a megabyte: it would draw the icons a second time, that
// the theme's font and style sheet, which every page loads anyway, show as well.
