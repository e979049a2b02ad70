// Sphinx's weights of what a search finds; a section whose title is asked for comes first.
var Scorer = {
  objNameMatch: 200, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 150, partialTitle: 7, term: 5, partialTerm: 2,
};
